"""Families that ranks can share tell of queries, keys and values as soon as they have each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psa_diffusers import apply_psa
from psa_diffusers.families import find_family
from psa_diffusers.patch.parallel.exchange import PARTS
from psa_testing.expectations import preset
from psa_testing.families import PARALLEL

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PARALLEL)
def test_each_part_is_ready_before_the_next_is_projected(name, monkeypatch):
    case = PARALLEL[name].case
    pipe = case.make()
    family = find_family(pipe.transformer)
    project, layers = family.project, set()

    def listened(attn, call):
        events, told = [], {}
        linears = {"values": attn.to_v, "keys": attn.to_k, "queries": attn.to_q}
        hooks = [
            linear.register_forward_pre_hook(lambda *_, part=part: events.append(f"project {part}"))
            for part, linear in linears.items()
        ]

        def ready(part, x):
            events.append(f"{part} are ready")
            told[part] = x

        found = project(attn, replace(call, ready=ready))
        for hook in hooks:
            hook.remove()
        assert events == [event for part in PARTS for event in (f"project {part}", f"{part} are ready")]
        assert all(told[part] is x for part, x in zip(PARTS, found, strict=True))
        layers.add(attn)
        return found

    monkeypatch.setattr(family, "project", staticmethod(listened))
    with apply_psa(pipe, preset(dense_steps=0.0), strict=True):
        case.run(pipe, num_inference_steps=2)
    assert layers >= set(family.self_attentions(pipe.transformer).values())
