"""The naive attention kernel and its benchmark, in Triton's interpreter."""

from __future__ import annotations

import bench_tiles
import pytest
import torch
from operator_bench import naive, timing
from operator_bench.workloads import Workload

from psa_kernels import AttentionSpec, psa_attention, select_blocks
from psa_kernels.layout import make_layout
from psa_kernels.pyramid.triton import build_pyramid

SPECS = {
    "three levels": {"block_key": 32, "thresholds": (0.2, 0.5, 1.0)},
    "whole blocks": {"levels": (1,), "thresholds": (0.4,)},
    "blocks of 8 rows": {"levels": (8,), "thresholds": (1.0,)},
    "blocks of 4 rows": {"block_key": 32, "levels": (1, 8), "thresholds": (0.1, 0.9)},
    "mass": {"block_key": 32, "rule": "mass", "thresholds": (0.3, 0.5, 0.8)},
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("tokens", "dtype"), [(139, torch.float32), (128, torch.float16), (33, torch.float32)])
def test_the_naive_kernel_agrees_with_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    spec = AttentionSpec(block_query=64, **SPECS[name])
    q, k, v = ((1.5 * torch.randn(1, tokens, 1, 19)).to(dtype)[..., :16] for _ in range(3))
    lists = select_blocks(q, k, spec, implementation="reference")
    layout = make_layout(tokens, tokens, 0, 0, None)
    found = naive.sparse_attention(q, build_pyramid(k, v, layout, spec), lists, layout, spec, 0.25)
    wide = (x.double() for x in (q, k, v))
    expected = psa_attention(*wide, spec, lists=lists, scale=0.25, implementation="reference")
    assert (found.double() - expected).abs().max() < (2e-5 if dtype == torch.float32 else 4e-3)


def test_what_the_naive_kernel_does_not_take() -> None:
    q = torch.randn(1, 40, 1, 16)
    spec = AttentionSpec(block_query=64, block_key=16)
    layout = make_layout(40, 40, 0, 8, None)
    pyramid = build_pyramid(q, q, layout, spec)
    lists = select_blocks(q, q, spec, text_after=8, implementation="reference")
    with pytest.raises(ValueError, match="neither text"):
        naive.sparse_attention(q, pyramid, lists, layout, spec, 0.25)


def test_the_benchmark_compares_before_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Workload("toy", heads=1, head_dim=16, grid=(1, 10, 10))
    timed = []
    monkeypatch.setattr(timing, "measure", lambda call, repeats: (float(timed.append(call) or len(timed)), 0.0))
    names = ["psa-3", "all 8-fold"]
    chosen = {name: bench_tiles.pyramids(32)[name] for name in names}
    monkeypatch.setattr(bench_tiles, "pyramids", lambda block_key: chosen)
    rows = list(bench_tiles.measure(toy, 32, 3, {}, device="cpu"))
    assert [(row["pyramid"], row["method"]) for row in rows] == [
        (name, method) for name in names for method in ("naive", "psa-triton")
    ]
    # The first tuning was the fastest, as the clock only goes on; it is not looked for twice.
    assert rows[0]["tuning"] == naive.TUNINGS[0]._asdict() and rows[1]["tuning"] is None
    assert rows[0]["levels"] == [1, 2, 4] and rows[-1]["density"] == 0.125
    tunings = {(32, name): naive.TUNINGS[1] for name in names}
    monkeypatch.setattr(bench_tiles, "_fastest", None)
    wrong = lambda *arguments, **options: naive_kernel(*arguments, **options) * 1.05  # noqa: E731
    naive_kernel = naive.sparse_attention
    monkeypatch.setattr(naive, "sparse_attention", wrong)
    with pytest.raises(SystemExit, match="naive, psa-3, blocks of 32 keys: differs from psa-triton by 5"):
        list(bench_tiles.measure(toy, 32, 3, tunings, device="cpu"))


def test_no_kernel_pays_for_empty_levels() -> None:
    levels = {name: spec.levels for name, spec in bench_tiles.pyramids(64).items()}
    three = dict.fromkeys(("psa-3", "psa-4", "psa-5"), (1, 2, 4))
    assert levels == {"psa-1": (1,), **three, "psa-2": (4,), "all 8-fold": (8,)}
