"""AttentionSpec refuses what makes no sense, and says what would."""

from __future__ import annotations

import pytest

from psa_kernels import AttentionSpec, Importance

MISTAKES = [
    ({"block_query": 0}, "block_query=0: expected a positive integer"),
    ({"block_key": 64.0}, "block_key=64.0: expected a positive integer"),
    ({"levels": ()}, r"levels=\(\): expected at least one"),
    ({"levels": (1, 3, 4)}, "3 does not divide block_key=64"),
    ({"levels": (1, 4, 2)}, "strictly increasing"),
    ({"levels": (1, True, 2)}, "True: expected a positive integer"),
    ({"thresholds": (0.5,)}, "expected one per level"),
    ({"thresholds": (0.5, 0.4, 0.6)}, "do not decrease"),
    ({"thresholds": (0.1, 0.2, 1.1)}, "thresholds=1.1: expected a number between 0 and 1"),
    ({"thresholds": (0.1, 0.2, float("nan"))}, "expected a number between 0 and 1"),
    ({"thresholds": (0, 0, 0)}, "the last must be above 0"),
    ({"rule": "sum"}, "rule='sum': expected one of count, mass"),
    ({"rest": None}, "rest=None: expected one of skip, mean"),
    ({"precision": "int8"}, "precision='int8': expected one of native, int8_qk"),
    ({"thresholds": (0.1, 0.2, 10**400)}, "thresholds=1000.*: expected a number between 0 and 1"),
    ({"floor": -0.1}, "floor=-0.1"),
    ({"floor": 10**400}, "floor=1000.*: expected a number between 0 and 1"),
    ({"similarity": (0.5, 10**400)}, "cosines between -1 and 1"),
    ({"rule": "budget", "density": 10**400}, "density=1000.*: the rule 'budget' needs a number"),
    ({"similarity": (0.5,)}, "2 thresholds"),
    ({"similarity": (0.5, 2)}, "cosines between -1 and 1"),
    ({"importance": "sampled"}, "expected an Importance"),
    ({"importance": Importance(query_stride=5)}, "importance.query_stride=5: expected a divisor of the block of 128"),
    ({"importance": Importance(key_stride=128)}, "importance.key_stride=128: expected a divisor of the block of 64"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=[str(fields)[:60] for fields, _ in MISTAKES])
def test_mistakes_name_the_field_its_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        AttentionSpec(**fields)


@pytest.mark.parametrize("fields", [{"estimator": "random"}, {"statistic": "sum"}, {"query_stride": 0}], ids=str)
def test_importance_mistakes(fields):
    with pytest.raises(ValueError, match="importance"):
        Importance(**fields)


def test_lists_become_tuples_so_that_specs_compare_and_hash():
    spec = AttentionSpec(levels=[1, 2, 4], thresholds=[0.15, 0.25, 0.45])
    assert spec == AttentionSpec() and hash(spec) == hash(AttentionSpec())
