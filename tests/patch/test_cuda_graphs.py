"""CUDA graphs: what is around the attention may be captured, the attention never, as a replay runs no Python."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import utils as inductor

from psa_diffusers import apply_psa
from psa_diffusers.patch import graph_ops
from psa_testing.cases import SIZES
from psa_testing.spies import feigned_capture
from psa_testing.tiny_families import CASES, SPARSE, WAN, preset

pytestmark = pytest.mark.usefixtures("one_thread")

OPERATORS = {"attend": torch.ops.psa_diffusers.attend.default, "note_dense": torch.ops.psa_diffusers.note_dense.default}
HAS_TAG = hasattr(torch.Tag, "cudagraph_unsafe")
# What the portable kernels take of tiny models in float32. Every block is pooled by 2, for rounding may change choices.
SERVED = {"block": {"query": 64, "key": 16}, "thresholds": [0.0, 1.0, 1.0], "float32_on_gpu": "sparse"}
RUNS = [{}, {"prompt": "another, longer prompt"}, {"num_inference_steps": 6}, SIZES[0], {}]


@pytest.mark.skipif(not HAS_TAG, reason="this PyTorch cannot mark operators so")
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_not_to_be_captured(name):
    """As the compiler asks before it captures a graph, or a part of one."""
    graph = torch.fx.Graph()
    node = graph.call_function(OPERATORS[name])
    module = torch.fx.GraphModule({}, graph)
    assert inductor.get_first_incompatible_cudagraph_node(module) is node
    plain = torch.fx.Graph()
    plain.call_function(torch.ops.aten.add.Tensor)
    assert inductor.get_first_incompatible_cudagraph_node(torch.fx.GraphModule({}, plain)) is None


def test_an_older_pytorch_sees_an_argument_on_the_cpu():
    pipe = WAN.make()
    with apply_psa(pipe, SPARSE, strict=True) as psa:
        sites = [psa.processor._sites[block.attn1] for block in pipe.transformer.blocks]
        assert {site.number.device.type for site in sites} == {"cpu"}
    assert graph_ops.attend._opoverload is OPERATORS["attend"]


def test_a_capture_by_hand_says_why_it_cannot_be(monkeypatch):
    pipe = WAN.make()
    stock = WAN.run(pipe)
    with apply_psa(pipe, SPARSE, strict=True):
        sparse = WAN.run(pipe)
        cannot = pytest.raises(RuntimeError, match=r"cannot be captured into a CUDA graph: .*restore\(\)")
        with feigned_capture(monkeypatch), cannot:
            WAN.run(pipe)
        assert torch.equal(WAN.run(pipe), sparse)
    assert torch.equal(WAN.run(pipe), stock)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox-5b"])
@pytest.mark.parametrize("kept", [{}, {"refresh": 2, "share_guidance": True}], ids=["lists-made", "lists-kept"])
def test_a_transformer_with_reduced_overhead_computes_what_it_computes_eagerly(name, kept):
    """Dense and sparse steps, other inputs, another size and more steps: nothing of an earlier call may be left.

    Without guidance: of two forwards in a row PyTorch itself overwrites the output of the first.
    """
    case, pipe = CASES[name], CASES[name].make().to("cuda")
    alone = {"guidance_scale": 1.0, "negative_prompt": None}
    with apply_psa(pipe, preset(dense_steps=0.5, **SERVED, **kept)) as psa:
        eager = []
        for changes in RUNS:
            result = case.run(pipe, **changes, **alone)
            eager.append((result.clone(), psa.stats()))
            assert psa.stats().density_sparse is not None and psa.stats().implementation == "triton"
        torch._dynamo.reset()
        pipe.transformer.compile(mode="reduce-overhead")
        for changes, (expected, stats) in zip(RUNS, eager, strict=True):
            torch.testing.assert_close(case.run(pipe, **changes, **alone), expected, rtol=0, atol=2e-3)
            assert psa.stats() == stats
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_capture_by_hand_says_why_it_cannot_be():
    pipe = WAN.make().to("cuda")
    with apply_psa(pipe, preset(**SERVED)), pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        inputs = {
            "hidden_states": torch.zeros(1, 16, 3, 16, 16, device="cuda"),
            "timestep": torch.zeros(1, device="cuda"),
            "encoder_hidden_states": torch.zeros(1, 16, 32, device="cuda"),
        }
        with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
            pipe.transformer(**inputs)
