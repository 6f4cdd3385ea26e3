"""Time the operator, stage by stage, beside dense and other sparse attention: `python scripts/bench_operator.py`.

Needs a CUDA device. Inputs are random, so importance is flat and every list is as long as its preset says. Writes
JSON (hardware, versions, commit, rows), prints a table and, where matplotlib is installed, draws a plot.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from results import publish
from torch.nn.attention import SDPBackend, sdpa_kernel

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.layout import make_layout

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Workload:
    """One self-attention call: `heads` heads of `head_dim`, video tokens and then text tokens."""

    name: str
    heads: int
    head_dim: int
    video: int
    text: int = 0

    @property
    def dense_flops(self) -> float:
        return 4 * (self.video + self.text) ** 2 * self.head_dim * self.heads


WORKLOADS = (
    Workload("wan2.1-1.3b-480p", 12, 128, 32_760),
    Workload("wan2.1-14b-720p", 40, 128, 75_600),
    Workload("hunyuanvideo-720p", 24, 128, 118_800, 256),
    Workload("cogvideox-5b", 48, 64, 17_550, 226),
)
# psa-3 has density 0.25; the others scale its shares.
THRESHOLDS = {
    0.10: ((1, 2, 4), (0.06, 0.10, 0.18)),
    0.15: ((1, 2, 4), (0.09, 0.15, 0.27)),
    0.25: ((1, 2, 4), (0.15, 0.25, 0.45)),
    1.0: ((1,), (1.0,)),
}


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_operator: no CUDA device")
    rows = []
    for workload in WORKLOADS:
        if options.workload in (None, workload.name):
            for row in measure(workload, options):
                rows.append(row)
                print(_line(row), flush=True)
    publish("the operator, stage by stage, random data, medians", rows, options.output, device="cuda")
    if importlib.util.find_spec("matplotlib"):
        plot(rows, options.output.with_suffix(".png"))


def measure(workload: Workload, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of all methods on one workload."""
    torch.manual_seed(0)
    shape = (1, workload.video + workload.text, workload.heads, workload.head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    for method, call in peers(q, k, v).items():
        yield _row(workload, method, 1.0, "total", call, options)
    for density, (levels, thresholds) in THRESHOLDS.items():
        spec = AttentionSpec(
            block_key=options.block_key,
            levels=levels,
            thresholds=thresholds,
            importance=Importance(options.estimator, "max", options.query_stride, options.key_stride),
        )
        for stage, call in stages(q, k, v, workload, spec).items():
            yield _row(workload, "psa-triton", density, stage, call, options)
        if density < 1:
            flex = flex_attention_of_equal_density(q, k, v, density)
            if flex is not None:
                yield _row(workload, "flex", density, "total", flex, options)


def stages(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, workload: Workload, spec: AttentionSpec
) -> dict[str, Callable[[], object]]:
    """The whole operator and each of its stages, given what the stages before it return."""
    from psa_kernels.allocation.triton import allocate
    from psa_kernels.importance.triton import block_importance
    from psa_kernels.pyramid.triton import build_pyramid
    from psa_kernels.sparse.triton import sparse_attention

    layout = make_layout(q.shape[1], k.shape[1], 0, workload.text, None)
    scale = workload.head_dim**-0.5
    pyramid = build_pyramid(k, v, layout, spec)
    importance = block_importance(q, k, layout, spec, scale, pyramid)
    lists = select_blocks(q, k, spec, text_after=workload.text, implementation="triton")
    return {
        "pyramid": lambda: build_pyramid(k, v, layout, spec),
        "importance": lambda: block_importance(q, k, layout, spec, scale, pyramid),
        "allocation": lambda: allocate(importance, None, spec),
        "attention": lambda: sparse_attention(q, pyramid, lists, layout, spec, scale),
        "total": lambda: psa_attention(q, k, v, spec, text_after=workload.text, implementation="triton"),
    }


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention by others, as far as it is importable here."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*heads_first)

    found = {
        "sdpa-fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    for module in ("flash_attn_interface", "fa3_fwd_interface"):
        if importlib.util.find_spec(module):
            found["fa3"] = partial(importlib.import_module(module).flash_attn_func, q, k, v)
            break
    return found


def flex_attention_of_equal_density(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float, block: int = 128
) -> Callable[[], object] | None:
    """FlexAttention with a random block mask, which costs it nothing; None where it cannot be compiled."""
    try:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention
    except ImportError:
        return None
    blocks = math.ceil(q.shape[1] / block)
    kept = max(1, round(density * blocks))
    ids = torch.rand(blocks, blocks, device=q.device).argsort(-1)[:, :kept].sort(-1).values
    full = F.pad(ids, (0, blocks - kept))[None, None].int()
    counts = torch.full((1, 1, blocks), kept, dtype=torch.int32, device=q.device)
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, torch.zeros_like(full), counts, full, BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: compiled(*heads_first, block_mask=mask)


def _row(
    workload: Workload,
    method: str,
    density: float,
    stage: str,
    call: Callable[[], object],
    options: argparse.Namespace,
) -> dict:
    row = {"workload": workload.name, "method": method, "density": density, "stage": stage}
    try:
        milliseconds, extra = _time(call, options.repeats)
    except Exception as error:  # a peer that does not run here is a fact to report, not a reason to stop
        torch.cuda.empty_cache()
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    flops = workload.dense_flops * density if stage in ("total", "attention") else None
    tflops = None if flops is None else round(flops / milliseconds / 1e9, 1)
    return {**row, "ms": round(milliseconds, 3), "tflops": tflops, "extra_gib": round(extra, 3)}


def _time(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds, and peak memory in GiB beyond what was allocated before the call and what it returns."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    returned = torch.cuda.memory_allocated() - before
    extra = (torch.cuda.max_memory_allocated() - before - returned) / 2**30
    del result
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], extra


def plot(rows: list[dict], path: Path) -> None:
    """Whole-call times of every method, one panel a workload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    totals = [row for row in rows if row["stage"] == "total" and "ms" in row]
    names = list(dict.fromkeys(row["workload"] for row in totals))
    if not names:
        return
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 4), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        chosen = [row for row in totals if row["workload"] == name]
        panel.barh([f"{row['method']} {row['density']:.2f}" for row in chosen], [row["ms"] for row in chosen])
        panel.set(title=name, xlabel="ms")
        panel.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _line(row: dict) -> str:
    label = f"{row['workload']:18} {row['method']:11} {row['density']:.2f} {row['stage']:10}"
    if "error" in row:
        return f"{label} {row['error']}"
    tflops = "" if row["tflops"] is None else f"{row['tflops']:7.1f} TFLOP/s"
    return f"{label} {row['ms']:9.3f} ms {tflops:15} {row['extra_gib']:6.2f} GiB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=[workload.name for workload in WORKLOADS], help="default: all")
    parser.add_argument("--block-key", type=int, default=64)
    parser.add_argument("--estimator", choices=("sampled", "pooled"), default="sampled")
    parser.add_argument("--query-stride", type=int, default=8)
    parser.add_argument("--key-stride", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/operator.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
