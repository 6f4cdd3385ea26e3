"""Tables of whole models: forwards, runs and single blocks."""

from __future__ import annotations

from figure_tables import block_rows, operator
from figure_tables.source import Row, commits_of, duration, find, gpu_of, load, machine, need, origin, table, times

MODEL = "benchmarks/model"
PARALLEL = "benchmarks/parallel"
EXCHANGE = "benchmarks/parallel-exchange"
PROMPTS = "benchmarks/prompts"
STACK = "benchmarks/stack"
WHOLE_RUN = "benchmarks/stack-h200"
DEMO = "benchmarks/demo"
BLOCKS = "benchmarks/blocks"
CALIBRATION = "quality/calibration"
STEPS = 50
# What is shown of each workload of bench_model.py.
FORWARDS = {
    "wan2.1-14b-720p": "Wan2.1-14B 720p",
    "hunyuanvideo-720p": "HunyuanVideo 720p",
    "wan2.1-1.3b-720p": "Wan2.1-1.3B 720p",
    "wan2.1-1.3b-480p": "Wan2.1-1.3B 480p",
    "cogvideox-5b": "CogVideoX-5B",
    "h3-5s": "MiniMax-H3 768 x 1344, 5 s, 37,296 tokens",
    "h3-15s": "MiniMax-H3 768 x 1344, 15 s, 107,856 tokens",
    "ltx2-1080p-10s": "LTX-2.5 1088 x 1920, 10 s, 63,240 tokens",
    "cosmos2.5-2b-720p": "Cosmos-Predict2.5-2B 704 x 1280, 84,480 tokens",
    "kandinsky5-lite-5s": "Kandinsky 5 Lite 512 x 768, 5 s, 47,616 tokens",
    "ltx-video-480p": "LTX-Video 480 x 704, 6,930 tokens",
}
STACKS = {**FORWARDS, "h3-10s": "MiniMax-H3 768 x 1344, 10 s"}
HEADLINE = ("wan2.1-14b-720p", "hunyuanvideo-720p", "h3-15s", "wan2.1-1.3b-480p")
SHORT = {"LTX-2.5-Diffusers": "LTX-2.5", "ChronoEdit-14B-Diffusers": "ChronoEdit"}


def forward(workload: str, method: str, density: float = 1.0) -> Row | None:
    return find(MODEL, workload=workload, method=method, density=density, compiled=True)


def fastest_dense(workload: str) -> Row:
    """The fastest dense forward that was run."""
    rows = [row for method in ("sdpa-default", "sdpa-cudnn", "fa3") if (row := forward(workload, method)) is not None]
    if not rows:
        raise LookupError(f"docs/{MODEL}.json has no dense forward of {workload}")
    return min(rows, key=lambda row: row["ms"])


def whole() -> str:
    """Forwards of whole transformers."""
    body: list[list[str]] = []
    shown: list[Row] = []
    for workload, title in FORWARDS.items():
        best = fastest_dense(workload)
        peers = [forward(workload, method) for method in ("sdpa-cudnn", "fa3")]
        ours = [forward(workload, "psa", density) for density in (0.25, 0.15)]
        shown += [row for row in (best, *peers, *ours) if row is not None]
        cells = ["not run" if row is None else duration(row["ms"]) for row in peers]
        cells += ["not run" if row is None else times(row["ms"], best["ms"]) for row in ours]
        body.append([title, *cells, _run(ours[1], best), gpu_of(MODEL, ours[1] or best)])
    head = ["one forward", "cuDNN dense", "FlashAttention-3 dense", "psa-3, density 0.25", "scaled to 0.15"]
    head += [f"{STEPS} steps, a quarter dense, at 0.15", "GPU"]
    return f"{table(head, body)}\n\n{commits_of(shown).capitalize()}."


def _run(ours: Row | None, dense: Row) -> str:
    if ours is None or ours.get("run_50_steps_s") is None or dense.get("run_50_steps_s") is None:
        return ""
    return f"{ours['run_50_steps_s']:.0f} s instead of {dense['run_50_steps_s']:.0f} s"


def headline() -> str:
    """The one table of README: a call, whole forwards, and runs of them."""
    body: list[list[str]] = []
    shown: list[Row] = [load(operator.GPU)]
    dense = operator.fastest_dense(operator.LONG)["ms"]
    ours = [
        need(operator.GPU, workload=operator.LONG, method="psa-hopper", density=d, stage="total") for d in (0.25, 0.15)
    ]
    cells = [times(row["ms"], dense) for row in ours]
    body.append(["attention of one layer, Wan2.1-14B 720p", duration(dense), *cells, ""])
    for workload in HEADLINE:
        best = fastest_dense(workload)
        found = [forward(workload, "psa", density) for density in (0.25, 0.15)]
        shown += [row for row in (best, *found) if row is not None]
        cells = ["not run" if row is None else times(row["ms"], best["ms"]) for row in found]
        title = FORWARDS[workload].rsplit(",", 2)[0] if workload == "h3-15s" else FORWARDS[workload]
        body.append([f"one forward, {title}", duration(best["ms"]), *cells, _run(found[1], best)])
    gpus = sorted({load(operator.GPU)["hardware"]["gpu"], *(gpu_of(MODEL, fastest_dense(name)) for name in HEADLINE)})
    head = ["", "fastest dense", "density 0.25", "density 0.15", f"{STEPS} steps, at 0.15"]
    where = f"On one {' or '.join(gpus)}, bf16, random weights and data, compiled blocks, medians, {commits_of(shown)}."
    return f"{table(head, body)}\n\n{where} Runs are sums of\nsteps, a quarter of them dense."


def demo() -> str:
    """Presets on the demo model on a CPU."""
    body = []
    for row in load(DEMO)["rows"]:
        seconds = [f"{row['step_seconds']:.2f}", f"{row['denoise_seconds']:.1f}"]
        if row["preset"] == "dense":
            body.append(["dense", "1", "1", "", "", *seconds])
        else:
            quality = [f"{row['psnr']:.1f} dB", f"{row['ssim']:.3f}"]
            body.append(
                [row["preset"], f"{row['density_sparse']:.2f}", f"{row['density_run']:.2f}", *quality, *seconds]
            )
    head = ["preset", "density of sparse steps", "of the run", "PSNR", "SSIM", "s a sparse step", "s denoising"]
    return f"{table(head, body)}\n\nOn {machine(DEMO)}, {origin(DEMO)}."


def parallel() -> str:
    """One video on several GPUs."""
    body = []
    rows = load(PARALLEL)["rows"]
    counts = sorted({row["gpus"] for row in rows})
    # Rows that agree in these are of one run.
    kinds = ("workload", "method", "compiled", "commit", "run")
    for values in dict.fromkeys(tuple(row.get(kind) for kind in kinds) for row in rows):
        kind = dict(zip(kinds, values, strict=True))
        one = need(PARALLEL, gpus=1, **kind)
        cells, by = [], ""
        for gpus in counts:
            row = find(PARALLEL, gpus=gpus, **kind)
            if row is None:
                cells.append("")
            elif gpus == 1:
                cells.append(duration(row["ms"]))
            else:
                cells.append(f"{duration(row['ms'])} ({row['speedup']:.2f}x)")
                by = {"memory": "copies"}.get(row["exchange"], row["exchange"])
        what = f"density {one['density']:.2f}" if one["method"] == "psa" else "cuDNN dense"
        blocks = "compiled" if one["compiled"] else "eager"
        cards = gpu_of(PARALLEL, one).split()[1]
        body.append([STACKS[one["workload"]], what, blocks, *cells, by, cards, one["commit"]])
    several = ("one GPU" if gpus == 1 else f"{gpus} GPUs" for gpus in counts)
    head = ["one forward of", "", "blocks", *several, "exchange", "GPUs", "commit"]
    where = f"On hosts with {' or '.join(sorted({gpu_of(PARALLEL, row) for row in rows}))}, {load(PARALLEL)['date']}."
    return f"{table(head, body)}\n\n{where}"


def parallel_exchange() -> str:
    """One video on two GPUs, by copies and by collectives."""
    body = []
    for compiled in (False, True):
        cells = [duration(need(EXCHANGE, gpus=1, compiled=compiled)["ms"])]
        for kind in ("memory", "collectives"):
            row = need(EXCHANGE, gpus=2, compiled=compiled, exchange=kind)
            cells.append(f"{duration(row['ms'])} ({row['speedup']:.2f}x)")
        body.append(["compiled" if compiled else "eager", *cells])
    shown = table(["blocks", "one GPU", "2 GPUs, by copies", "by collectives"], body)
    where = f"{load(EXCHANGE)['hardware']['gpu']}s of one host, {origin(EXCHANGE)}"
    return f"{shown}\n\nWan2.1-14B at 720p, density 0.15, {where}."


def prompts() -> str:
    """Many prompts on one GPU and on several."""
    rows = load(PROMPTS)["rows"]
    one, many = rows[0], rows[-1]
    return (
        f"{many['prompts']} prompts of the demo model on {many['processes']} of one host's "
        f"{load(PROMPTS)['hardware']['gpu']}: {many['settled_per_s']:.2f} prompts a second\ninstead of "
        f"{one['settled_per_s']:.2f} on one once models are loaded, {100 * many['share']:.0f} % of "
        f"{many['processes']} times; {many['same_files']} of {many['prompts']} files are the same\n({origin(PROMPTS)})."
    )


def stack() -> str:
    """Whole runs as one thing after the other is switched on, a table for each model."""
    rows = load(STACK)["rows"]
    runs = dict.fromkeys((row["workload"], row["scales"]) for row in rows)
    parts = [_lines([row for row in rows if (row["workload"], row["scales"]) == run]) for run in runs]
    return "\n\n".join([*parts, f"On {machine(STACK)}, {commits_of(rows)}, {load(STACK)['date']}."])


def whole_run_lines() -> str:
    """The same of the run that README tells of."""
    return f"{_lines(load(WHOLE_RUN)['rows'])}\n\nOn {machine(WHOLE_RUN)}, {origin(WHOLE_RUN)}."


def _lines(rows: list[Row]) -> str:
    body = []
    for row in rows:
        added = row["stack"].split(" + ")[-1]
        label = added if not body else f"+ {added}"
        if "error" in row:
            body.append([label, "does not run", *[""] * 5])
            continue
        psnr = "" if row["demo_psnr"] is None else f"{row['demo_psnr']:.1f} dB"
        seconds = (duration(row["ms_dense"]), duration(row["ms_sparse"]), f"{row['seconds_50']:.0f} s")
        body.append([label, *seconds, f"{row['speedup']:.2f}x", f"{row['peak_gib']:.0f} GiB", psnr])
    title = STACKS[rows[0]["workload"]] + (", a scale a tensor" if rows[0]["scales"] == "tensor" else "")
    return table([title, "dense forward", "sparse forward", "50 steps", "speedup", "peak", "PSNR of the demo"], body)


def whole_run() -> str:
    """That run in words: stock, sparse attention, all that leaves no forward out, and all."""
    rows = load(WHOLE_RUN)["rows"]
    _, sparse, computed, cached = told = (*rows[:2], *rows[-2:])
    seconds = [f"{row['seconds_50']:,.0f} s" for row in told]
    gains = [f"{row['speedup']:.1f}x" for row in told]
    *added, last = computed["stack"].removeprefix(sparse["stack"] + " + ").split(" + ")
    skipped = [f"{100 * cached[name]:.0f} %" for name in ("skipped_dense", "skipped_sparse")]
    psnr = [f"{row['demo_psnr']:.1f}" for row in told[1:]]
    return (
        f"{STEPS} steps of Wan2.1-14B at 720p take {seconds[0]} with cuDNN's dense attention, {seconds[1]} at density "
        f"0.15 ({gains[1]}),\n{seconds[2]} with {', '.join(added)} and {last} as well ({gains[2]}),\n"
        f"and {seconds[3]} if diffusers' first-block cache skips as many forwards as on the demo model "
        f"({gains[3]}),\n{skipped[0]} of the dense and {skipped[1]} of the sparse ones. "
        f"Videos of the demo model then have a PSNR of\n"
        f"{psnr[0]}, {psnr[1]} and {psnr[2]} dB against dense ones.\n"
        f"(Times: {machine(WHOLE_RUN)}, compiled blocks, sums of measured forwards, {origin(WHOLE_RUN)}.)"
    )


def blocks() -> str:
    """One block of each published transformer, a table for each GPU."""
    rows = load(BLOCKS)["rows"]
    parts = []
    for gpu in dict.fromkeys(gpu_of(BLOCKS, row) for row in rows):
        parts.append(f"On one {gpu}:\n\n{block_rows.table([row for row in rows if gpu_of(BLOCKS, row) == gpu])}")
    return "\n\n".join(parts)


def short_blocks() -> str:
    """What so few tokens gain that attention is not most of the work."""
    said = []
    for name, title in SHORT.items():
        row = need(BLOCKS, name=name)
        ours, dense = duration(row["psa_ms"]), duration(row["dense_ms"])
        said.append(f"{title}'s {row['tokens']:,} tokens {ours} with psa-3 and {dense} dense")
    told = f"A block takes on {', on '.join(said)} ({gpu_of(BLOCKS, row)})."
    parts = []
    for compiled in (False, True):
        kind = {"workload": "ltx-video-480p", "compiled": compiled}
        dense, ours = need(MODEL, method="sdpa-cudnn", **kind), need(MODEL, method="psa", density=0.25, **kind)
        blocks = "compiled" if compiled else "eager"
        parts.append(f"{times(ours['ms'], dense['ms'])} instead of {duration(dense['ms'])} with {blocks} blocks")
    whole = f"A forward of LTX-Video, 28 blocks on 6,930 tokens, takes at density 0.25 {' and '.join(parts)}"
    return f"{told}\n{whole} ({gpu_of(MODEL, ours)})."


def calibration() -> str:
    """What psa-calibrate tried, best first, and what its choice gave on other prompts."""
    trials = load(CALIBRATION)["result"]["trials"]
    body = []
    for trial in sorted(trials[1:], key=lambda trial: -trial["gain_db"]):
        name = "the best of each layer" if trial["shape"] == "layer by layer" else trial["shape"]
        gain = f"{trial['gain_db']:+.1f} ± {trial['gain_interval_db']:.1f} dB"
        body.append([name + " (kept)" * trial["kept"], f"{trial['density']:.3f}", gain])
    return f"{table(['tried', 'density', 'against psa-3'], body)}\n\nOn {machine(CALIBRATION)}, {origin(CALIBRATION)}."
