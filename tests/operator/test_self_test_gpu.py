"""The self-test of the kernels for Hopper with the installed Triton: it takes what works, and not what is broken."""

from __future__ import annotations

import pytest
import torch

from psa_kernels import AttentionSpec, psa_attention
from psa_kernels.backends import choose, hopper, self_test, triton
from psa_kernels.backends.choose import SlowerKernelWarning

pytest.importorskip("triton")
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")]
TOKENS, HEADS = 4096, 3


@pytest.fixture(autouse=True)
def unknown(monkeypatch, tmp_path):
    """The installed version is one that is not known, and nothing is remembered of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hopper, "KNOWN_VERSIONS", ())
    monkeypatch.setattr(hopper, "MIN_HOPPER_WORK", 0)
    monkeypatch.setattr(self_test, "_answers", {})
    choose._warn_once.cache_clear()
    yield
    choose._warn_once.cache_clear()


def inputs(head_dim=128, dtype=torch.bfloat16, text=0):
    return [torch.randn(1, TOKENS + text, HEADS, head_dim, device="cuda", dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "native"), (torch.float16, "native"), (torch.bfloat16, "int8_qk")]
)
@pytest.mark.parametrize(
    ("block_key", "levels", "text", "permuted"),
    [(64, (1, 2, 4), (0, 0), False), (32, (2, 4), (77, 0), True), (128, (1, 2, 4, 8, 16), (5, 226), False)],
)
def test_the_installed_version_passes(head_dim, dtype, precision, block_key, levels, text, permuted, monkeypatch):
    thresholds = tuple((index + 1) / len(levels) for index in range(len(levels)))
    spec = AttentionSpec(block_key=block_key, levels=levels, thresholds=thresholds, precision=precision)
    options = {"text_before": text[0], "text_after": text[1], "return_stats": True, "strict": True}
    if permuted:
        options["permutation"] = torch.randperm(TOKENS, device="cuda")
    q, k, v = inputs(head_dim, dtype, sum(text))
    state = torch.cuda.get_rng_state()
    _, stats = psa_attention(q, k, v, spec, **options)
    assert stats.implementation == ("hopper" if precision == "native" else "hopper-int8")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert list(self_test._answers.values()) == [None]
    # Another process finds the answer on disk.
    self_test._answers.clear()
    monkeypatch.setattr(self_test, "_problem", lambda *_: pytest.fail("tested again"))
    psa_attention(q, k, v, spec, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", [(0, 0), (5, 226)])
def test_the_installed_version_passes_in_causal_calls(dtype, text):
    options = {"text_before": text[0], "text_after": text[1], "causal": True, "strict": True, "return_stats": True}
    _, stats = psa_attention(*inputs(128, dtype, sum(text)), AttentionSpec(), **options)
    assert stats.implementation == "hopper" and list(self_test._answers.values()) == [None]


@pytest.mark.parametrize("precision", ["native", "int8_qk"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_kernel_that_is_broken_is_not_used(value, precision, monkeypatch):
    from psa_kernels.sparse.hopper import launch

    works = launch.sparse_attention

    def broken(q, *arguments, out, **options):
        works(q, *arguments, out=out, **options)
        out[:, 1234, 1] = value

    spec = AttentionSpec(precision=precision)
    monkeypatch.setattr(launch, "sparse_attention", broken)
    with pytest.warns(SlowerKernelWarning, match="its self-test failed: an output differs"):
        _, stats = psa_attention(*inputs(), spec, return_stats=True)
    assert stats.implementation == "triton"
    with pytest.raises(RuntimeError, match=r"strict: .* its self-test failed"):
        psa_attention(*inputs(), spec, strict=True)


def test_sums_that_run_over_are_part_of_it(monkeypatch):
    from psa_kernels.sparse.hopper import launch
    from psa_kernels.sparse.reference import sparse_attention

    attend = triton.Triton.attend

    def attend_or_define(self, call, keys, lists, out):
        """By the reference, in float64, where the portable kernel attends, which was taken away."""
        if self.name != "triton":
            return attend(self, call, keys, lists, out)
        wide = torch.empty_like(out, dtype=torch.float64)
        q, k, v = (x.double() for x in (call.q, call.k, call.v))
        sparse_attention(q, k, v, lists, call.layout, call.spec, call.scale, wide)
        out.copy_(wide)

    monkeypatch.setattr(launch.portable, "launch", lambda *_, only=None, **__: None)
    monkeypatch.setattr(triton.Triton, "attend", attend_or_define)
    with pytest.raises(RuntimeError, match="its self-test failed: an output differs"):
        psa_attention(*inputs(), AttentionSpec(), strict=True)


def test_nothing_is_tested_while_a_graph_is_captured():
    q, k, v = inputs()
    spec = AttentionSpec()
    psa_attention(q, k, v, spec, implementation="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(SlowerKernelWarning, match="not tested while a CUDA graph is captured"), torch.cuda.graph(graph):
        _, stats = psa_attention(q, k, v, spec, return_stats=True)
    assert stats.implementation == "triton"
    assert psa_attention(q, k, v, spec, return_stats=True)[1].implementation == "hopper"


def test_it_runs_where_waiting_for_the_device_is_an_error():
    q, k, v = inputs()
    psa_attention(q, k, v, AttentionSpec(), implementation="triton")
    try:
        torch.cuda.set_sync_debug_mode("error")
        _, stats = psa_attention(q, k, v, AttentionSpec(), return_stats=True)
        assert torch.cuda.get_sync_debug_mode() == 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stats.implementation == "hopper"
