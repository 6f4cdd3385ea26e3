"""Nothing grows from call to call."""

from __future__ import annotations

import gc

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.patch.token_order import KEPT_ON_DEVICES, permutation_on
from psa_kernels import AttentionSpec, psa_attention
from psa_testing.tiny_families import CASES, preset
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import run as run_small
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = Case(lambda: tiny_wan(num_layers=2), {**GUIDED, **SMALL_TEXT, "height": 64, "width": 64})
HUNYUAN = Case(CASES["hunyuan-video"].make, {**CASES["hunyuan-video"].inputs, "height": 64, "width": 64})


def run(pipe, **inputs):
    return run_small(pipe, output_type="latent", **inputs)


def tensors() -> tuple[int, int]:
    """How many tensors there are in the process, and how many bytes they take."""
    gc.collect()
    # By type: to ask some lazy modules what they are imports them.
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return len(found), sum(x.untyped_storage().nbytes() for x in found if x.device.type == "cpu")


def test_200_calls_of_the_operator():
    q, k, v = torch.randn(3, 1, 150, 2, 16).unbind()
    spec = AttentionSpec(block_query=64, block_key=16)

    def calls(count):
        for _ in range(count):
            psa_attention(q, k, v, spec, return_stats=True)
        return tensors()

    assert calls(5) == calls(200)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (WAN, {}),
        (WAN, {"refresh": 2, "share_guidance": True}),
        (HUNYUAN, {"refresh": 2}),
    ],
    ids=["wan", "wan-kept-lists", "hunyuan-video-kept-lists"],
)
def test_200_forwards_of_a_patched_pipeline(case, changes):
    pipe = case.make()
    with apply_psa(pipe, preset(**changes), strict=True) as psa:

        def forwards(count):
            """Two guidance branches, four steps: eight forwards a run."""
            for _ in range(count // 8):
                case.run(pipe)
            return tensors()

        before = forwards(16)
        assert forwards(200) == before
        notes = psa.processor._runs._run.notes
        assert len(notes) == 8 and {len(forward) for forward in notes} == {len(psa.stats().layers)}


KEEPS = preset(dense_steps=0.5, correction=True, refresh=4, share_guidance=True)


def kept_by(psa):
    """How many lists and corrections a patch keeps for later forwards."""
    run = psa.processor._runs._run
    return len(run.lists._entries), len(run.corrections._kept)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_nothing_is_kept_after_the_last_forward_of_a_run(guidance):
    pipe, seen = tiny_wan(num_layers=2), []
    branches = 2 if guidance > 1 else 1
    with apply_psa(pipe, KEEPS, strict=True) as psa:
        # Before the hook of the patch, which is the last to look at a forward.
        pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(kept_by(psa)))
        run(pipe, num_inference_steps=4, guidance_scale=guidance)
        assert seen[-1][0] == 2 and kept_by(psa) == (0, 0)
    assert len(seen) == 4 * branches and max(count for _, count in seen) == 2 * branches


def test_nothing_is_kept_where_guidance_ended_before():
    pipe = tiny_wan(num_layers=2)

    def end_guidance(pipe, step, _timestep, inputs):
        if step == 2:
            pipe._guidance_scale = 1.0
        return inputs

    with apply_psa(pipe, preset(correction=True, refresh=2), strict=True) as psa:
        run(pipe, num_inference_steps=6, callback_on_step_end=end_guidance)
        assert kept_by(psa) == (0, 0)


def test_nothing_is_kept_of_a_run_of_one_step():
    with apply_psa(pipe := tiny_wan(num_layers=2), preset(refresh=2, dense_steps=0.0), strict=True) as psa:
        run(pipe, num_inference_steps=1)
        assert kept_by(psa) == (0, 0)


@torch.no_grad()
def test_a_loop_of_one_step_that_sets_its_timesteps_once():
    with apply_psa(pipe := tiny_wan(num_layers=2), preset(share_guidance=True, dense_steps=0.0), strict=True) as psa:
        pipe.scheduler.set_timesteps(1)
        text = torch.randn(1, 16, 32)
        for _ in range(5):
            pipe.transformer(torch.randn(1, 16, 1, 8, 8), pipe.scheduler.timesteps, text)
        assert len(psa.processor._runs._run.notes) == 1


def test_an_expert_that_has_done_its_part_keeps_nothing():
    pipe, seen = tiny_wan(two_stage=True, num_layers=2), []
    changes = {"dense_steps": 0.125, "refresh": 8}
    with apply_psa(pipe, KEEPS.replace(**changes), strict=True) as psa:

        def look(_pipe, step, _timestep, inputs):
            run = psa.processor._runs._run
            seen.append({layer.split(".")[0] for layer, *_ in (*run.lists._entries, *run.corrections._kept)})
            return inputs

        run(pipe, num_inference_steps=8, callback_on_step_end=look)
        first = [row[0] is not None for row in psa.stats().density]
    changed = first.index(False)
    assert 1 < changed < 6
    assert seen[1:changed] == [{"transformer"}] * (changed - 1)
    assert seen[changed] == {"transformer", "transformer_2"}
    assert seen[changed + 1 : 7] == [{"transformer_2"}] * (6 - changed) and seen[7] == set()


def test_an_interrupted_run_keeps_nothing_after_the_patch():
    pipe = tiny_wan(num_layers=2)

    def interrupt(pipe, step, _timestep, inputs):
        pipe._interrupt = step == 2
        return inputs

    with apply_psa(pipe, KEEPS, strict=True) as psa:
        run(pipe, num_inference_steps=6, callback_on_step_end=interrupt)
        run(pipe, num_inference_steps=4)
        assert kept_by(psa) == (0, 0)
        run(pipe, num_inference_steps=6, callback_on_step_end=interrupt)
    assert kept_by(psa) == (0, 0)


def test_sizes_that_change_keep_few_permutations():
    pipe = WAN.make()
    with apply_psa(pipe, preset(), strict=True):
        for width in range(48, 48 + 16 * 12, 16):
            WAN.run(pipe, width=width, num_inference_steps=2)
            assert permutation_on.cache_info().currsize <= KEPT_ON_DEVICES
