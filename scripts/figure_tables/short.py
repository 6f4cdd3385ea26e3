"""Blocks of short sequences, of attention in float32 and of CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

from figure_tables.source import Row, commits_of, duration, load, machine, need, origin, table, times

SHORT, FLOAT32, GRAPHS = "benchmarks/min-tokens", "benchmarks/float32", "benchmarks/graphs"
GENERATE = "benchmarks/generate"
MODES = ("eager", "compiled", "reduce-overhead", "captured")


def short() -> str:
    """Sparse calls by length beside the dense ones, in bfloat16."""
    rows = [row for row in load(SHORT)["rows"] if row["dtype"] == "bfloat16"]
    body = []
    shapes = dict.fromkeys((row["tokens"], row["heads"], row["head_dim"]) for row in rows)
    for tokens, heads, head_dim in shapes:
        alike = [row for row in rows if (row["tokens"], row["heads"], row["head_dim"]) == (tokens, heads, head_dim)]
        first = alike[0]
        made, kept = ([row for row in alike if row["kept_lists"] == given] for given in (False, True))
        work = f"{first['dense_gflop']:,.0f} GFLOP"
        shape = f"{tokens:,} x {heads} x {head_dim}"
        body.append([shape, work, duration(first["dense_us"] / 1000), _span(made), _span(kept)])
    head = ["tokens x heads x head_dim", "dense work", "dense", "sparse", "sparse, lists kept"]
    return f"{table(head, body)}\n\nOn {machine(SHORT)}, bf16, density 0.15 and 0.25, both kernels, {origin(SHORT)}."


def float32() -> str:
    """Sparse calls in float32 beside the dense ones."""
    rows = [row for row in load(FLOAT32)["rows"] if not row["tf32"]]
    body = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        dense = need(FLOAT32, workload=name, method="sdpa", tf32=False)
        sparse = [row for row in rows if row["workload"] == name and row["method"] != "sdpa"]
        by_density = [times(row["ms"], dense["ms"]) for row in sorted(sparse, key=lambda row: -row["density"])]
        shape = f"{name}, {dense['tokens']:,} x {dense['heads']} x {dense['head_dim']}"
        body.append([shape, duration(dense["ms"]), *by_density])
    shares = sorted({row["density"] for row in rows if row["method"] != "sdpa"}, reverse=True)
    head = ["tokens x heads x head_dim", "dense", *(f"density {share:g}" for share in shares)]
    return f"{table(head, body)}\n\nOn {machine(FLOAT32)}, {origin(FLOAT32)}."


def graphs() -> str:
    """A forward without and with CUDA graphs."""
    rows = load(GRAPHS)["rows"]
    body = []
    for model, phase in dict.fromkeys((row["model"], row["phase"]) for row in rows):
        of_mode = {row["mode"]: row for row in rows if (row["model"], row["phase"]) == (model, phase)}
        cells = []
        for mode in MODES:
            row = of_mode.get(mode)
            cells.append("not run" if row is None else "fails" if "error" in row else duration(row["ms"]))
        body.append([model, phase, *cells])
    where = f"On {machine(GRAPHS)}, {commits_of(rows)}, {load(GRAPHS)['date']}."
    return f"{table(['', 'forward', *MODES], body)}\n\n{where}"


def generate() -> str:
    """Denoising of the demo model by `psa-generate --compare`, without and with CUDA graphs."""
    rows = load(GENERATE)["rows"]
    body = []
    for row in rows:
        seconds = [f"{row[name]:.3f} s" for name in ("dense_s", "sparse_s")]
        steps = [f"{row[name]:.1f} ms" for name in ("dense_step_ms", "sparse_step_ms")]
        body.append([row["mode"], *seconds, f"{row['dense_s'] / row['sparse_s']:.2f}x", *steps])
    head = ["", "dense", f"with {rows[0]['preset']}", "", "a dense step", "a sparse step"]
    where = f"On {machine(GENERATE)}, means over {load(GENERATE)['prompts']} prompts, {origin(GENERATE)}."
    return f"{table(head, body)}\n\n{where}"


def _span(rows: Sequence[Row]) -> str:
    least, most = min(row["us"] for row in rows), max(row["us"] for row in rows)
    dense = rows[0]["dense_us"]
    return f"{least / 1000:.2f} to {most / 1000:.2f} ms ({dense / most:.1f}x to {dense / least:.1f}x)"
