"""Calls by addresses on a GPU: one after the other, on several streams at once, and replayed beside them."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import poison_free_memory

from psa_kernels import AttentionSpec, psa_attention

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SPEC = AttentionSpec()
TEXT = {"text_before": 3, "text_after": 70}
VIDEO = 3000


@pytest.fixture(params=["triton", "hopper"])
def implementation(request):
    if request.param == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return request.param


def inputs(outlier=0.0):
    """Random q, k, v `[1, N, 6, 64]`; outliers among the keys let frozen maxima of the Hopper kernel run over."""
    q, k, v = torch.randn(3, 1, VIDEO + 73, 6, 64, dtype=torch.bfloat16, device="cuda")
    if outlier:
        q[..., 0] = k[:, 2880:2944, :, 0] = outlier
    return q, k, v


@pytest.mark.parametrize("outlier", [0.0, 40.0])
def test_alike_calls_are_each_as_if_they_were_the_first(implementation, outlier):
    permutation = torch.randperm(VIDEO, device="cuda")
    settings = {"permutation": permutation, "implementation": implementation, **TEXT}
    for turn in range(4):
        q, k, v = inputs(outlier)
        poison_free_memory()
        out, lists = psa_attention(q, k, v, SPEC, return_lists=True, **settings)
        poison_free_memory()
        again = psa_attention(q, k, v, SPEC, lists=lists, **settings)
        # A scale of its own, the same in float32, makes it a call that was never made before.
        scale = 64**-0.5 * (1 + 1e-9 * (turn + 1))
        fresh = psa_attention(q, k, v, SPEC, lists=lists, scale=scale, **settings)
        assert torch.equal(out, again) and torch.equal(out, fresh) and bool(out.isfinite().all())


def test_calls_on_several_streams_and_a_replayed_graph_share_nothing(implementation):
    settings = {"implementation": implementation, **TEXT}
    cases = [inputs(40.0 * (index % 2)) for index in range(4)]
    expected = [psa_attention(*case, SPEC, return_lists=True, **settings) for case in cases]
    held = [x.clone() for x in cases[0]]
    lists = expected[0][1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        psa_attention(*held, SPEC, lists=lists, **settings)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = psa_attention(*held, SPEC, lists=lists, **settings)
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        graph.replay()
        for each, case, (_, kept) in zip(streams, cases, expected, strict=True):
            with torch.cuda.stream(each):
                results.append(psa_attention(*case, SPEC, lists=kept, **settings))
        torch.cuda.synchronize()
        assert torch.equal(captured, expected[0][0])
        assert all(torch.equal(found, out) for found, (out, _) in zip(results, expected, strict=True))
    for x, other in zip(held, cases[1], strict=True):
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, psa_attention(*cases[1], SPEC, lists=lists, **settings))


@pytest.mark.parametrize("outlier", [0.0, 40.0])
def test_an_output_is_written_where_the_caller_wants_it(implementation, outlier):
    """Between other rows of its memory, which stay as they are, call after call."""
    settings = {"permutation": torch.randperm(VIDEO, device="cuda"), "implementation": implementation, **TEXT}
    memory = torch.empty(3, VIDEO + 73, 6, 64, dtype=torch.bfloat16, device="cuda")
    for turn in range(3):
        q, k, v = inputs(outlier)
        expected, lists = psa_attention(q, k, v, SPEC, return_lists=True, **settings)
        for given in (None, lists):
            memory.fill_(float("nan"))
            out = memory[turn : turn + 1]
            found = psa_attention(q, k, v, SPEC, lists=given, out=out, **settings)
            assert found is out and torch.equal(memory[turn], expected[0])
            assert int(memory.isfinite().all((1, 2, 3)).sum()) == 1
