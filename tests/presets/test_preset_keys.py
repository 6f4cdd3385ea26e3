"""What editors complete is what presets take."""

from typing import get_type_hints

import pytest

from psa_diffusers import Preset
from psa_presets import keys
from psa_presets.fields import BlockSizes, ImportanceSettings, LayerRule, LayerSettings, StepRule

PAIRS = [
    (keys.BlockKeys, BlockSizes),
    (keys.ImportanceKeys, ImportanceSettings),
    (keys.LayerKeys, LayerSettings),
    (keys.RuleKeys, LayerRule),
    (keys.RuleKeys, StepRule),
    (keys.PresetKeys, Preset),
]


@pytest.mark.parametrize(("typed", "model"), PAIRS, ids=lambda kind: kind.__name__)
def test_the_keys_are_those_of_the_model(typed, model):
    assert set(get_type_hints(typed)) == set(model.model_fields)
