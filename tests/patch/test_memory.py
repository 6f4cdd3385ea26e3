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
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = Case(lambda: tiny_wan(num_layers=2), {**GUIDED, **SMALL_TEXT, "height": 64, "width": 64})
HUNYUAN = Case(CASES["hunyuan-video"].make, {**CASES["hunyuan-video"].inputs, "height": 64, "width": 64})


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


def test_sizes_that_change_keep_few_permutations():
    pipe = WAN.make()
    with apply_psa(pipe, preset(), strict=True):
        for width in range(48, 48 + 16 * 12, 16):
            WAN.run(pipe, width=width, num_inference_steps=2)
            assert permutation_on.cache_info().currsize <= KEPT_ON_DEVICES
