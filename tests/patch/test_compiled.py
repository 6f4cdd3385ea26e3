"""Compiled blocks: one graph for sparse layers beside the dense one, and the results of eager blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from psa_diffusers import apply_psa
from psa_diffusers.families import AttentionCall
from psa_diffusers.families.mochi import Mochi
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.dense_reasons import Fallbacks, PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.run import Forward, Route, Run
from psa_diffusers.patch.sites import site_of
from psa_diffusers.patch.text_padding import TextLengths
from psa_diffusers.runs import compiled as regional
from psa_testing.tiny_families import CASES, SPARSE, assert_equal_to_rounding, preset
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")

WAN = Case(tiny_wan, {**GUIDED, **SMALL_TEXT})


def compile_blocks(pipe, backend="eager"):
    """Blocks of the pipeline's transformer as whole graphs; returns the counter of graphs."""
    counter = CompileCounterWithBackend(backend)
    regional.compile_blocks(pipe.transformer, fullgraph=True, backend=counter)
    return counter


# Of each case, graphs of its stock blocks; an older diffusers lacks some.
STOCK_GRAPHS = {
    # Its token refiner and patch embedding are compiled too.
    "hunyuan-video": 5,
    # The first block gets its text as a view, which takes a graph of its own.
    "cogvideox-5b": 2,
    # Stock Mochi is no graph: dense and sparse layers share one; the last block, which drops its text, has its own.
    "mochi": 1,
    "cosmos2": 1,
    "anyflow": 1,
    "easyanimate": 2,
    # Its refiner is compiled too.
    "minimax-h3": 3,
    # Its video attention has gates, and tokens after the video.
    "ltx2.5-condition": 1,
    # Decoder blocks, which have no mask, take a graph of their own.
    "motif-video": 3,
    # The text blocks of video and audio are compiled too.
    "kandinsky6": 3,
}
COMPILED = [
    pytest.param(CASES[name], "eager", graphs, id=name) for name, graphs in STOCK_GRAPHS.items() if name in CASES
]


@pytest.mark.parametrize(("case", "backend", "stock_graphs"), [pytest.param(WAN, "aot_eager", 1, id="wan"), *COMPILED])
def test_a_compiled_run_is_that_of_eager_blocks(case, backend, stock_graphs, monkeypatch):
    """Two guidance branches, several layers and steps: none of them makes a graph of its own."""
    pipe = case.make()
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        eager, stats = case.run(pipe), psa.stats()
        masks = []
        read = TextLengths._read
        monkeypatch.setattr(TextLengths, "_read", staticmethod(lambda mask: masks.append(1) or read(mask)))
        counter = compile_blocks(pipe, backend)
        assert_equal_to_rounding(case.run(pipe), eager)
        assert psa.stats() == stats and 0.2 < stats.density_sparse < 0.5
    assert stock_graphs < counter.frame_count <= 2 * stock_graphs
    # The text's lengths are brought from the device at most once a sparse forward, not once a layer.
    assert len(masks) <= 2 * 2


def test_what_the_preset_leaves_dense_is_bit_identical_and_noted():
    pipe = WAN.make()
    compile_blocks(pipe)
    stock = WAN.run(pipe)
    with apply_psa(pipe, preset(dense_steps=1.0)) as psa:
        assert torch.equal(WAN.run(pipe), stock)
    assert psa.stats().density == [[1.0] * 4] * 4 and psa.stats().fallbacks == {}
    with apply_psa(pipe, preset(dense_steps=0.5, min_tokens=1000)) as psa:
        with pytest.warns(PSAFallbackWarning, match="shorter than min_tokens"):
            assert torch.equal(WAN.run(pipe), stock)
        assert list(psa.stats().fallbacks.values()) == [2 * 2 * 4]
    assert all(site_of(block.attn1) is None and site_of(block.attn2) is None for block in pipe.transformer.blocks)


def test_rules_for_steps_change_what_a_graph_computes():
    """The operators behind the graph ask what the layer computes at the step; dense and sparse layers take turns."""
    pipe = WAN.make()
    rules = [
        {"match": "0-50%", "order": "raster", "thresholds": [0.1, 0.1, 0.1]},
        {"match": 2, "dense": True},
        {"match": 3, "dense": False},
    ]
    chosen = preset(dense_steps=0, dense_last=0.0, steps=rules, layers=[{"match": 1, "dense": True}])
    with apply_psa(pipe, chosen, strict=True) as psa:
        eager, stats = WAN.run(pipe), psa.stats()
        counter = compile_blocks(pipe)
        assert_equal_to_rounding(WAN.run(pipe), eager)
        assert psa.stats() == stats and stats.dense_at == [2]
        assert [row[1] == 1 for row in stats.density] == [True, True, True, False]
    assert counter.frame_count == 2


def test_a_mask_that_is_not_of_padding_runs_dense():
    """Only the call shows it, when the block's graph for sparse layers is already chosen."""
    case, pipe = CASES["skyreels-v2-forcing"], CASES["skyreels-v2-forcing"].make()
    pipe.transformer._set_ar_attention(2)
    inputs = {"num_frames": 13, "causal_block_size": 2, "ar_step": 1}
    stock = case.run(pipe, **inputs)
    compile_blocks(pipe)
    with apply_psa(pipe, SPARSE) as psa, pytest.warns(PSAFallbackWarning, match="diffusion forcing in causal blocks"):
        assert_equal_to_rounding(case.run(pipe, **inputs), stock)
    assert psa.stats().density_run == 1 and psa.stats().fallbacks
    with apply_psa(pipe, SPARSE, strict=True), pytest.raises(PSAFallbackError, match="masks the attention"):
        case.run(pipe, **inputs)


def test_padding_amid_text_is_attended_by_nobody_there():
    attention = TokenAttention(Mochi, Fallbacks(strict=False))
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    mask = torch.tensor([[True, False, True]])
    call = AttentionCall(q[:, :6], q[:, 6:], mask)
    layer = SimpleNamespace(name="a")
    forward = Forward(Run(), 0, {"a": Route(True)}, grid=(1, 2, 3))
    route = attention.decide(forward, layer, call)
    assert not route.sparse and "padding" in route.reason
    real = [0, 1, 2, 3, 4, 5, 6, 8]
    alone = F.scaled_dot_product_attention(*(x[:, real].transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(torch.cat(attention.dense((q, k, v), call), dim=1)[:, real], alone)
