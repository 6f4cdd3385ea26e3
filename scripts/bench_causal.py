"""Time causal calls, stage by stage, beside dense attention: `python scripts/bench_causal.py`.

One layer of Qwen2.5-VL-7B: 28 heads of queries, 4 of keys and values, head_dim 128, bf16; whole calls also with the
last 512 tokens dense, as text after a video. Needs a CUDA device and Triton; a peer that is not importable is skipped
(operator_bench/flex_prefill.py says how FlexPrefill becomes importable).
Inputs are random, so that importance is flat and every list is as long as its rule says. Times are medians of calls
enqueued back to back. The extra memory is the peak beyond the inputs and the output. The error is that of some queries
against dense attention in float32: of random inputs, of which sparse attention misses most, so that it compares methods
and no more. Writes JSON and, beside it, tables as .md, which `--tables-only` makes again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from operator_bench import flex_prefill
from operator_bench.peers import versions
from operator_bench.timing import measure
from results import document, write
from torch.nn.attention import SDPBackend, sdpa_kernel

from psa_kernels import AttentionSpec, psa_attention
from psa_kernels.backends import BACKENDS
from psa_kernels.call import Call, make_call
from psa_kernels.full import FULL
from psa_presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128
TOKENS = (32_768, 65_536, 131_072)
DENSITIES = (0.35, 0.25, 0.15)
DENSE_LAST = 512
# Queries whose outputs are compared with dense attention.
SAMPLE = 64
Row = dict[str, Any]


def main() -> None:
    options = _arguments()
    if options.tables_only:
        show(json.loads(options.tables_only.read_text()), options.tables_only)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_causal: no CUDA device")
    rows: list[Row] = []
    begun = time.perf_counter()
    for tokens in options.tokens:
        for row in measured(tokens, options):
            rows.append(row)
            print(_line(row), flush=True)
        torch.cuda.empty_cache()
        # Written after each length: a call that breaks the device ends the process.
        settings = {
            "query_heads": HEADS,
            "key_heads": KEY_HEADS,
            "head_dim": HEAD_DIM,
            "dense_last": DENSE_LAST,
            "block_query": FULL.block_query,
            "block_key": options.block_key,
            "repeats": options.repeats,
            "peers": versions(),
        }
        what = "causal calls of one layer of Qwen2.5-VL-7B, random data, bf16, medians"
        result = document(what, rows, device="cuda", commit=options.commit, **settings)
        write(result, options.output)
    show(result, options.output)
    print(f"{time.perf_counter() - begun:.0f} s")


def measured(tokens: int, options: argparse.Namespace) -> Iterator[Row]:
    """Rows of all methods at one length."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    sample, exact = _dense_sample(q, k, v)
    for name, call in peers(q, k, v).items():
        yield _row(tokens, name, 1.0, "total", call, q, options.repeats, (sample, exact))
    for name, density, call in sparse_peers(q, k, v):
        yield _row(tokens, name, density, "total", call, q, options.repeats, (sample, exact))
    for spec in specs(options.block_key):
        yield from ours(q, k, v, spec, options, (sample, exact))


def specs(block_key: int) -> Iterator[AttentionSpec]:
    """The two rules at every density, and everything."""
    psa_3 = load_preset("psa-3")
    for density in DENSITIES:
        thresholds = psa_3.at_density(density).thresholds
        yield AttentionSpec(block_key=block_key, levels=psa_3.levels, thresholds=thresholds)
        yield AttentionSpec(block_key=block_key, levels=psa_3.levels, rule="budget", density=density)
    yield replace(FULL, block_key=block_key)


def peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Dense causal attention by others, on `[B, N, H, D]`."""

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    found: dict[str, Callable[[], torch.Tensor]] = {
        "sdpa-cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "sdpa-fa2": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    }
    try:
        flash_attn_func = importlib.import_module("fa3_fwd_interface").flash_attn_func
    except ImportError as error:
        print(f"fa3 skipped: {error}", flush=True)
    else:

        def fa3() -> torch.Tensor:
            out = flash_attn_func(q, k, v, causal=True)
            attended: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return attended

        found["fa3"] = fa3
    return found


def sparse_peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[str, float, Callable[[], torch.Tensor]]]:
    """Sparse causal attention by others at every density, on `[B, N, H, D]`: method, density, call."""
    try:
        flex_prefill.load()
        for density in DENSITIES:
            yield "flexprefill", *flex_prefill.at_density(q, k, v, density)
    except Exception as error:  # a peer that does not run here is no reason to stop
        print(f"flexprefill skipped: {type(error).__name__}: {error}", flush=True)


def ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, options: argparse.Namespace, sample: Any
) -> Iterator[Row]:
    """Stages and whole calls. Stages are those that a call of all heads at once goes through."""
    call = make_call(q, k, v, spec, causal=True)
    tokens, rule = q.shape[1], "everything" if spec.levels == (1,) else spec.rule
    name = f"psa-{rule}"
    _, stats = psa_attention(q, k, v, spec, causal=True, return_stats=True)
    density = stats.density.mean().item()
    for implementation in options.implementations:
        backend = next(each for each in BACKENDS if each.name == implementation)
        obstacle = backend.why_not(call)
        if obstacle is not None:
            print(f"{implementation} skipped: {obstacle}", flush=True)
            continue
        method = f"{name}-{implementation}"
        whole = partial(psa_attention, q, k, v, spec, causal=True, implementation=implementation)
        yield _row(tokens, method, density, "total", whole, q, options.repeats, sample)
        text_last = partial(whole, text_after=DENSE_LAST)
        yield _row(tokens, method, density, f"total, last {DENSE_LAST} dense", text_last, q, options.repeats, None)
        if options.stages:
            for stage, part in stages(call, backend, first=implementation == options.implementations[0]).items():
                yield _row(tokens, method, density, stage, part, q, options.repeats, None)


def stages(call: Call, backend: Any, first: bool) -> dict[str, Callable[[], object]]:
    """Each stage is given what the stages before it return; those that backends share are told once."""
    from psa_kernels.causal.triton_allocation import allocate
    from psa_kernels.causal.triton_budget import allocate_budget
    from psa_kernels.causal.triton_importance import block_importance
    from psa_kernels.causal.triton_prices import upgrade_prices
    from psa_kernels.pyramid.triton import build_pyramid

    q, k, v, causal, spec = call.q, call.k, call.v, call.causal, call.spec
    assert causal is not None
    keys = backend.pool_keys(call, True)
    importance = block_importance(q, k, causal, call.layout, spec, call.scale)
    found: dict[str, Callable[[], object]] = {
        "pyramid": partial(build_pyramid, k, v, call.layout, spec),
        "importance": partial(block_importance, q, k, causal, call.layout, spec, call.scale),
    }
    if spec.rule == "budget":
        found["prices"] = partial(upgrade_prices, q, k, v, importance, causal, call.layout, spec, call.scale)
        found["allocation"] = partial(allocate_budget, found["prices"](), importance, causal, spec)
    else:
        found["allocation"] = partial(allocate, importance, keys.coarsest, causal, spec)
    lists = found["allocation"]()
    out = torch.empty_like(q)
    found = found if first else {}
    found["values + attention"] = partial(backend.attend, call, keys, lists, out)
    return found


def _dense_sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some queries before the text, and their dense outputs in float32."""
    places = torch.linspace(1024, q.shape[1] - DENSE_LAST - 1, SAMPLE, device=q.device).long()
    mask = torch.arange(q.shape[1], device=q.device) <= places[:, None]
    exact = torch.empty(SAMPLE, HEADS, HEAD_DIM, device=q.device)
    for head in range(HEADS):
        keys, values = (x[0, :, head * KEY_HEADS // HEADS].float() for x in (k, v))
        logits = q[0, places, head].float() @ keys.T * HEAD_DIM**-0.5
        exact[:, head] = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values
    return places, exact


def _row(
    tokens: int, method: str, density: float, stage: str, call: Callable[[], Any], q: torch.Tensor, repeats: int,
    sample: tuple[torch.Tensor, torch.Tensor] | None,
) -> Row:  # fmt: skip
    row: Row = {"tokens": tokens, "method": method, "density": round(density, 4), "stage": stage}
    try:
        milliseconds, extra = measure(call, repeats)
        row["ms"] = round(milliseconds, 4)
        if sample is not None:
            row["extra_over_output"] = round(extra * 2**30 / q.nbytes - 1, 3)
            row["tflops"] = round(density * 2 * tokens**2 * HEAD_DIM * HEADS / milliseconds / 1e9, 1)
            places, exact = sample
            row["error"] = round(((call()[0, places].float() - exact).norm() / exact.norm()).item(), 5)
    except Exception as error:  # a call that does not run here is a fact to report, not a reason to stop
        torch.cuda.empty_cache()
        row["failure"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def _line(row: Row) -> str:
    label = f"{row['tokens']:7} {row['method']:22} {row['density']:.4f} {row['stage']:19}"
    if "failure" in row:
        return f"{label} {row['failure']}"
    rest = "" if "tflops" not in row else f" {row['tflops']:6.1f} TFLOP/s, +{row['extra_over_output']:.2f} outputs"
    return f"{label} {row['ms']:9.3f} ms{rest}" + (f", error {row['error']:.4f}" if "error" in row else "")


def show(result: dict[str, Any], output: Path) -> None:
    """Print whole calls as a table, and write all rows as tables beside the JSON."""
    lines = [
        f"# Causal calls\n\n{result['what']}; {result['hardware']}; commit {result['commit']}, {result['date']}.\n"
    ]
    header = (
        "| tokens | method | density | ms | TFLOP/s | extra memory, outputs | error on a sample |\n" + "|---" * 7 + "|"
    )
    totals = [row for row in result["rows"] if row["stage"] == "total"]
    lines += [header, *(_table_row(row) for row in totals)]
    staged = [row for row in result["rows"] if row["stage"] != "total"]
    if staged:
        lines += ["\n| tokens | method | density | stage | ms |\n" + "|---" * 5 + "|"]
        for row in staged:
            value = row["failure"] if "failure" in row else f"{row['ms']:.3f}"
            lines.append(f"| {row['tokens']:,} | {row['method']} | {row['density']:.3f} | {row['stage']} | {value} |")
    text = "\n".join(lines) + "\n"
    output.with_suffix(".md").write_text(text)
    print(text)


def _table_row(row: Row) -> str:
    start = f"| {row['tokens']:,} | {row['method']} | {row['density']:.3f} |"
    if "failure" in row:
        return f"{start} {row['failure']} | | | |"
    return f"{start} {row['ms']:.2f} | {row['tflops']:.0f} | {row['extra_over_output']:.2f} | {row['error']:.4f} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--block-key", type=int, default=64)
    parser.add_argument("--implementations", nargs="+", default=["triton", "hopper"], help="default: both")
    parser.add_argument("--no-stages", dest="stages", action="store_false", help="whole calls alone")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; fewer of those that take over 100 ms")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/causal.json")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--tables-only", type=Path, metavar="JSON", help="measure nothing, show this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
