"""Tables of single calls of the operator."""

from __future__ import annotations

from typing import Any

from figure_tables.source import Row, digits, duration, find, load, machine, need, origin, table, times

GPU = "benchmarks/operator"
AUTHORS = "benchmarks/operator-authors"
INT8 = "benchmarks/operator-int8"
BUDGET = "benchmarks/operator-budget"
CPU = "benchmarks/cpu"
HOST = "benchmarks/host"
HOST_AGAIN = "benchmarks/host-again"
POWER = "benchmarks/power"
SCALING = "benchmarks/scaling"
DENSE = ("sdpa-fa2", "sdpa-cudnn", "fa3")
CALLS = {
    "wan2.1-14b-720p": "Wan2.1-14B 720p, 75,600 tokens",
    "wan2.1-1.3b-480p": "Wan2.1-1.3B 480p, 32,760 tokens",
    "hunyuanvideo-720p": "HunyuanVideo 720p, 119,056 tokens",
    "cogvideox-5b": "CogVideoX-5B, 17,776 tokens, head_dim 64",
}
LONG = "wan2.1-14b-720p"
VARIANTS = {"free": "programs do not wait", "in step": "in step", "near": "near", "fa3": "FlashAttention-3"}
# Stage, its method, and what arithmetic, memory traffic and exponentials alone would take on an H200 (docs/kernels.md).
FLOORS = (
    ("pyramid", "pyramid", "psa-hopper", "", "0.57 ms", ""),
    (
        "importance, sampled, max, 8 x 8",
        "importance",
        "psa-hopper",
        "1.16 ms",
        "0.3 ms, 0.6 ms with a scratch that leaves the cache",
        "0.85 ms",
    ),
    ("allocation", "allocation", "psa-hopper", "", "0.03 ms", ""),
    ("attention, Hopper", "attention", "psa-hopper", "22.3 ms", "", "8.2 ms"),
    ("attention, portable", "attention", "psa-triton", "22.3 ms", "", "8.2 ms"),
)


def call(workload: str, method: str, density: float = 1.0, *, name: str = GPU) -> Row | None:
    return find(name, workload=workload, method=method, density=density, stage="total")


def fastest_dense(workload: str) -> Row:
    """The fastest dense peer of the run."""
    rows = [row for method in DENSE if (row := call(workload, method)) is not None]
    if not rows:
        raise LookupError(f"docs/{GPU}.json has no dense call of {workload}")
    return min(rows, key=lambda row: row["ms"])


def gpu() -> str:
    """Calls of the Hopper kernel beside dense attention."""
    body = []
    for workload, title in CALLS.items():
        dense = fastest_dense(workload)["ms"]
        peers = [call(workload, method) for method in ("sdpa-cudnn", "fa3")]
        cells = ["not run" if row is None else duration(row["ms"]) for row in peers]
        for density in (0.25, 0.15, 0.10):
            ours = need(GPU, workload=workload, method="psa-hopper", density=density, stage="total")
            cells.append(times(ours["ms"], dense))
        body.append([title, *cells])
    head = ["one self-attention call", "cuDNN dense", "FlashAttention-3 dense", "density 0.25", "0.15", "0.10"]
    return f"{table(head, body)}\n\nOn {machine(GPU)}, {origin(GPU)}."


def authors() -> str:
    """The code of the paper's authors beside ours."""
    kind: dict[str, Any] = {"workload": LONG, "density": 0.15, "stage": "total"}
    ours, theirs, hilbert = (
        need(AUTHORS, method=f"psa-{name}", **kind) for name in ("hopper", "authors", "hopper-hilbert")
    )
    return (
        f"For the first row at density 0.15 the authors' own code took {duration(theirs['ms'])} where this took "
        f"{duration(ours['ms'])},\nand {theirs['extra_gib']:.1f} GiB beyond its inputs where this takes "
        f"{ours['extra_gib']:.1f} ({hilbert['extra_gib']:.1f} in Hilbert order; {machine(AUTHORS)}, {origin(AUTHORS)})."
    )


def portable() -> str:
    """The portable kernels beside the one for Hopper."""
    hopper, triton = (need(GPU, workload=LONG, method=f"psa-{kind}", density=0.15, stage="total") for kind in KINDS)
    return (
        f"On {machine(GPU)} the portable kernels take {duration(triton['ms'])} where the other takes "
        f"{duration(hopper['ms'])} (the first row\nat density 0.15)."
    )


KINDS = ("hopper", "triton")


def int8() -> str:
    """Integers beside bfloat16, attention alone and whole calls."""
    body = []
    for density in (0.15, 0.25):
        cells = []
        for stage in ("attention", "total"):
            for method in ("psa-hopper", "psa-hopper-int8"):
                cells.append(duration(need(INT8, workload=LONG, method=method, density=density, stage=stage)["ms"]))
        making = need(INT8, workload=LONG, method="psa-hopper-int8", density=density, stage="quantise")
        body.append([f"{density:.2f}", *cells[:2], duration(making["ms"]), *cells[2:]])
    head = ["density", "attention, bf16", "8-bit", "making integers", "whole call, bf16", "8-bit"]
    return f"{table(head, body)}\n\nWan2.1-14B at 720p on {machine(INT8)}, {origin(INT8)}."


def int8_beside() -> str:
    """What integers do to other calls, and by the portable kernel."""

    def pair(workload: str, kernel: str = "hopper") -> str:
        methods = (f"psa-{kernel}", f"psa-{kernel}-int8")
        rows = [need(INT8, workload=workload, method=each, density=0.15, stage="total") for each in methods]
        return f"{duration(rows[1]['ms'])} instead of {duration(rows[0]['ms'])}"

    extra = [need(INT8, workload=LONG, method=f"psa-hopper{end}", density=0.15, stage="total") for end in ("-int8", "")]
    more = extra[0]["extra_gib"] - extra[1]["extra_gib"]
    return (
        f"They take {more:.2f} GiB more there. Whole calls at density 0.15 take with them\n"
        f"{pair('hunyuanvideo-720p')} for HunyuanVideo, {pair('wan2.1-1.3b-480p')} for Wan2.1-1.3B at 480p, "
        f"and {pair('cogvideox-5b')} for\nCogVideoX-5B, whose head_dim is 64. By the portable kernel, which stands in "
        f"there for other cards, Wan2.1-14B takes\n{pair(LONG, 'triton')}."
    )


def budget() -> str:
    """What the rule `budget` pays for choosing, beside the rule `count`."""
    case = {"workload": LONG, "method": "psa-hopper", "density": 0.15}
    prices, allocation = (duration(need(BUDGET, **case, stage=stage)["ms"]) for stage in ("prices", "allocation"))
    count = duration(need(GPU, **case, stage="allocation")["ms"])
    return (
        f"For Wan2.1-14B at 720p and density 0.15, on {machine(BUDGET)}, prices take {prices} and the allocation\n"
        f"{allocation}, where it takes {count} under the rule `count`."
    )


def cpu() -> str:
    """Calls of the reference beside torch's dense attention."""
    body = []
    for row in load(CPU)["rows"]:
        if row["nominal_density"] != 0.25:
            continue
        case = {key: row[key] for key in ("tokens", "head_dim", "heads")}
        less = need(CPU, **case, nominal_density=0.15)
        cells = [f"{each['psa_ms']:.0f} ms, {each['ratio']:.2f}x" for each in (row, less)]
        body.append([f"{row['tokens']:,}", str(row["head_dim"]), f"{row['dense_ms']:.0f} ms", *cells])
    heads = load(CPU)["rows"][0]["heads"]
    shown = table(["tokens", "head_dim", "dense", "psa-3, density 0.25 to 0.26", "scaled to 0.15 to 0.16"], body)
    return f"{shown}\n\n{heads} heads, {machine(CPU)}, {origin(CPU)}."


def host() -> str:
    """What the host takes to launch a call, beside what the GPU takes."""
    return _host(HOST)


def host_again() -> str:
    """The same of short calls on another host."""
    return _host(HOST_AGAIN)


def _host(name: str) -> str:
    body = []
    for tokens, heads, dim in dict.fromkeys((r["tokens"], r["heads"], r["head_dim"]) for r in load(name)["rows"]):
        case = {"tokens": tokens, "heads": heads, "head_dim": dim}
        dense = need(name, **case, implementation="sdpa")
        body.append([f"{tokens:,}, {heads} x {dim}", "dense", *_microseconds(dense), ""])
        for kind, title in (("triton", "portable"), ("hopper", "Hopper")):
            new, kept = (find(name, **case, implementation=kind, kept_lists=kept) for kept in (False, True))
            if new is not None:
                body.append(["", title, *_microseconds(new), f"{kept['host_us']:,.0f}" if kept else ""])
    head = [
        "tokens, heads x head_dim",
        "kernel",
        "host",
        "until the GPU is done",
        "from a CUDA graph",
        "host, kept lists",
    ]
    return f"{table(head, body)}\n\nMicroseconds, on {machine(name)}, {origin(name)}."


SHORT = 10_000  # tokens


def launch() -> str:
    """What the host takes to launch a call, and what a short call takes."""
    # Longer calls are several, one for each group of heads.
    rows = [row for row in load(HOST)["rows"] if not row["kept_lists"] and row["tokens"] <= SHORT]
    spans = {}
    for kind in ("triton", "hopper"):
        found = [row["host_us"] / 1000 for row in rows if row["implementation"] == kind]
        ends = dict.fromkeys(f"{each:.1f}" for each in (min(found), max(found)))
        spans[kind] = f"{' to '.join(ends)} ms"
    short = min(row["tokens"] for row in rows)
    dense = need(HOST, tokens=short, implementation="sdpa")
    sparse = min(row["wall_us"] for row in rows if row["tokens"] == short and row["implementation"] in spans)
    calls = f"{short:,} tokens and {dense['heads']} heads"
    return (
        f"On {machine(HOST)} the host takes {spans['triton']} to launch a call of the portable kernels,\n"
        f"and {spans['hopper']} for the kernel for Hopper. At {calls} a sparse call takes {sparse / 1000:.2f} ms\n"
        f"until the GPU is done, a dense one {dense['wall_us'] / 1000:.2f} ms."
    )


def _microseconds(row: Row) -> list[str]:
    return [f"{row[key]:,.0f}" if row.get(key) is not None else "" for key in ("host_us", "wall_us", "graph_us")]


def stages() -> str:
    """What each stage of a long call takes, beside the least that it could take."""
    body = []
    for title, stage, method, *floors in FLOORS:
        row = need(GPU, workload=LONG, method=method, density=0.15, stage=stage)
        body.append([title, duration(row["ms"]), *floors])
    shown = table(["stage", "measured", "arithmetic", "bytes", "exponentials"], body)
    return f"{shown}\n\nOn {machine(GPU)}, {origin(GPU)}."


def power() -> str:
    """Time and power of attention alone."""
    body = []
    rows = [row for row in load(POWER)["rows"] if row["variant"] != "fa3"]
    for row in [*rows, find(POWER, variant="fa3")]:
        if row is not None:
            cells = [
                digits(row["ms"]),
                f"{row['tflops']:.0f}",
                str(row["watts"]),
                f"{row['mhz']:,}",
                f"{row['joules']:.1f}",
            ]
            density = "1" if row["density"] == 1 else f"{row['density']:.2f}"
            body.append([VARIANTS.get(row["variant"], row["variant"]), density, *cells])
    shown = table(["Wan2.1-14B at 720p", "density", "ms", "TFLOP/s", "W", "MHz", "J"], body)
    return f"{shown}\n\nOn {machine(POWER)}, {origin(POWER)}."


def scaling() -> str:
    """Calls of growing length."""
    body = []
    for tokens, heads in dict.fromkeys((row["tokens"], row["heads"]) for row in load(SCALING)["rows"]):
        case = {"tokens": tokens, "heads": heads}
        cudnn, fa3 = (find(SCALING, **case, method=method) for method in ("sdpa-cudnn", "fa3"))
        ours = [find(SCALING, **case, method="psa", density=density) for density in (0.25, 0.15, 0.05)]
        base = min((row["ms"] for row in (cudnn, fa3) if row is not None), default=None)
        cells = [("" if row is None else duration(row["ms"])) for row in (cudnn, fa3)]
        cells += ["" if r is None else duration(r["ms"]) if base is None else times(r["ms"], base) for r in ours]
        body.append([f"{tokens:,}", str(heads), *cells])
    head = ["tokens", "heads", "cuDNN", "FlashAttention-3", "density 0.25", "0.15", "0.05"]
    return f"{table(head, body)}\n\nhead_dim 128, bf16, on {machine(SCALING)}, {origin(SCALING)}."
