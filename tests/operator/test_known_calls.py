"""What is kept of a call's checks, and when a call like an earlier one is checked anew."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch

from psa_kernels import AttentionSpec, call, known_calls
from psa_kernels.call import make_call


@pytest.fixture
def checked(monkeypatch):
    """How many calls were checked; none is known before."""
    monkeypatch.setattr(known_calls, "_known", type(known_calls._known)())
    made, check = [], call._checked_call

    def note(*arguments):
        made.append(arguments)
        return check(*arguments)

    monkeypatch.setattr(call, "_checked_call", note)
    return made


def on_meta(*shape, **options):
    """A tensor that is on no CPU, where all is checked at each call."""
    return torch.empty(*shape or (1, 40, 2, 16), device="meta", **options)


def test_a_call_is_checked_once_and_is_the_same_the_second_time(checked):
    q, k, v, permutation = on_meta(), on_meta(), on_meta(), on_meta(35, dtype=torch.int64)
    spec = AttentionSpec(block_query=16, block_key=8)
    first, second = (make_call(q, k, v, spec, 2, 3, permutation) for _ in range(2))
    assert len(checked) == 1 and second.q is q and second.k is k and second.v is v
    assert first.layout.counts == second.layout.counts == (2, 35, 3) and second.layout.video_queries == 35
    assert second.layout.permutation is permutation
    assert second.layout.short_permutation is first.layout.short_permutation
    assert (first.scale, first.spec, first.causal) == (second.scale, second.spec, second.causal)
    assert first.answers is second.answers


def test_another_call_is_checked(checked):
    q, spec = on_meta(), AttentionSpec(block_query=16, block_key=8)
    wide = on_meta(1, 40, 4, 16)[:, :, ::2]
    for arguments in (
        (q, q, q, spec), (wide, q, q, spec), (q, q, wide, spec), (q.half(), q.half(), q.half(), spec),
        (q, q, q, AttentionSpec(block_query=16, block_key=16)), (q, q, q, spec, 1), (q, q, q, spec, 0, 1),
        (q, q, q, spec, 0, 0, None, 0.5), (q, q, q, spec, 0, 0, on_meta(40, dtype=torch.int64)),
    ):  # fmt: skip
        before = len(checked)
        make_call(*arguments)
        make_call(*arguments)
        assert len(checked) == before + 1
    assert len(known_calls._known) == 9


def test_what_was_sound_does_not_excuse_what_is_not(checked):
    q, spec = on_meta(), AttentionSpec()
    make_call(q, q, q, spec, 1)
    with pytest.raises(ValueError, match="text_before=True"):
        make_call(q, q, q, spec, True)
    with pytest.raises(ValueError, match=r"text_before=1\.0"):
        make_call(q, q, q, spec, 1.0)
    with pytest.raises(ValueError, match="requires a gradient"):
        make_call(q, on_meta(requires_grad=True), q, spec, 1)
    make_call(q, q, q, spec)
    with pytest.raises(ValueError, match="expected int64"):
        make_call(q, q, q, spec, 0, 0, on_meta(40))


def test_a_permutation_that_was_written_to_is_looked_at_again(checked):
    q, spec, permutation = on_meta(), AttentionSpec(), on_meta(40, dtype=torch.int64)
    make_call(q, q, q, spec, 0, 0, permutation)
    permutation.add_(0)
    make_call(q, q, q, spec, 0, 0, permutation)
    assert len(checked) == 2


def test_on_a_cpu_every_permutation_is_looked_at(checked):
    q, permutation = torch.zeros(1, 4, 1, 8), torch.arange(4)
    make_call(q, q, q, AttentionSpec(), 0, 0, permutation)
    permutation.numpy()[0] = 1  # which counts as no write
    with pytest.raises(ValueError, match="exactly once"):
        make_call(q, q, q, AttentionSpec(), 0, 0, permutation)


def test_what_is_kept_is_bounded_and_keeps_no_tensor_alive(checked, monkeypatch):
    monkeypatch.setattr(known_calls, "KEPT_CALLS", 3)
    q, permutation = on_meta(), on_meta(40, dtype=torch.int64)
    for text in range(5):
        make_call(q, q, q, AttentionSpec(), text)
    assert len(known_calls._known) == 3
    make_call(q, q, q, AttentionSpec(), 0, 0, permutation)
    alive = weakref.ref(q), weakref.ref(permutation)
    del q, permutation
    checked.clear()
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_a_spec_is_hashed_anew_in_another_process():
    spec = AttentionSpec()
    assert hash(spec) == hash(AttentionSpec()) and vars(spec).keys() == AttentionSpec.__dataclass_fields__.keys()
    copy = pickle.loads(pickle.dumps(spec))
    assert copy == spec and not hasattr(copy, "_hash") and hash(copy) == hash(spec)


def test_an_answer_is_found_once_for_calls_that_share_their_answers(checked):
    asked = []

    def make(found):
        return lambda: asked.append(found) or found

    q, spec = on_meta(1, 40, 4, 16), AttentionSpec()
    first, second = (make_call(q, q, q, spec) for _ in range(2))
    other = make_call(q, q, q, spec, 1)
    assert known_calls.recall(first.answers, ("plan", 3), make(5)) == 5
    assert known_calls.recall(second.answers, ("plan", 3), make(6)) == 5
    assert known_calls.recall(second.answers, ("plan", 4), make(7)) == 7
    assert known_calls.recall(other.answers, ("plan", 3), make(8)) == 8
    assert [known_calls.recall(None, ("plan", 3), make(9)) for _ in range(2)] == [9, 9] and asked == [5, 7, 8, 9, 9]


def test_groups_of_heads_share_the_answers_of_the_same_heads_alone(checked):
    q, spec = on_meta(1, 40, 4, 16), AttentionSpec()
    first, second = (make_call(q, q, q, spec) for _ in range(2))
    answers = first.of_heads(slice(0, 2)).answers
    assert second.of_heads(slice(0, 2)).answers is answers is not first.answers
    assert second.of_heads(slice(2, 4)).answers is not answers and second.of_heads(slice(0, 3)).answers is not answers
