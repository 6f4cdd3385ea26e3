"""Families that ranks can share tell of values, queries and keys as soon as they have each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psa_diffusers import apply_psa
from psa_diffusers.families import find_family
from psa_testing.expectations import preset
from psa_testing.families import PARALLEL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PARALLEL)
def test_values_are_ready_before_queries_are_normalised_and_those_before_keys(name, monkeypatch):
    case = PARALLEL[name].case
    pipe = case.make()
    family = find_family(pipe.transformer)
    project, layers = family.project, set()

    def listened(attn, call):
        events, told = [], {}
        modules = {
            "to_q": attn.to_q,
            "to_k": attn.to_k,
            "to_v": attn.to_v,
            "norm_q": attn.norm_q,
            "norm_k": attn.norm_k,
        }
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: events.append(name))
            for name, module in modules.items()
            if module is not None
        ]

        def ready(part, x):
            events.append(part)
            told[part] = x

        query, key, value = found = project(attn, replace(call, ready=ready))
        for hook in hooks:
            hook.remove()
        assert sorted(events[:3]) == ["to_k", "to_q", "to_v"]
        assert events[3:] == ["values", "norm_q", "queries", "norm_k", "keys"]
        assert told["values"] is value and told["queries"] is query and told["keys"] is key
        layers.add(attn)
        return found

    monkeypatch.setattr(family, "project", staticmethod(listened))
    with apply_psa(pipe, preset(dense_steps=0.0), strict=True):
        case.run(pipe, num_inference_steps=2)
    assert layers >= set(family.self_attentions(pipe.transformer).values())
