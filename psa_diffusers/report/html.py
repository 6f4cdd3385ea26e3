"""report.html: one file that shows a run's videos and figures, and opens anywhere without a network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psa_diffusers.files import REPORT_FILE, whole_file
from psa_diffusers.report.svg import data_uri, line_plot, map_gradient, value_map

# Beyond this a browser gets slow; the report then shows the strip and links to the file.
MAX_VIDEO_BYTES = 100 * 2**20
ABSENT = "\u2013"
FLICKER_NOTE = "How differently a frame changes from the one before it, root mean square; 0 is equal."


def write_report(
    folder: Path,
    reports: list[dict[str, Any]],
    missing: int = 0,
    spent: Sequence[tuple[str, str]] = (),
    remarks: Sequence[str] = (),
) -> Path:
    """Write `folder/report.html`.

    Args:
        reports: what the prompts' report.json hold, each with its folder's name below `folder` under "folder".
        missing: prompts of the run that are not done yet.
        spent: where the seconds went of the process that made the last of them: a name and a time each.
        remarks: lines about the whole run, shown above the videos.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("psa_diffusers.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["svg"] = Markup  # svg.py escapes what it puts in
    first = reports[0]
    budget = MAX_VIDEO_BYTES
    sections = []
    for report in reports:
        section = _section(Path(folder), report, budget)
        budget -= section.pop("video_bytes")
        sections.append(section)
    html = environment.get_template("report.html.j2").render(
        title=_title(first),
        subtitle=_subtitle(first, len(reports), missing),
        headlines=_headlines(reports),
        sections=sections,
        missing=missing,
        remarks=remarks,
        gradient=map_gradient(),
        facts=[*_facts(first), *([("Where the seconds went", spent)] if spent else [])],
    )
    path = Path(folder) / REPORT_FILE
    with whole_file(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def _title(report: dict[str, Any]) -> str:
    if "title" in report:
        return report["title"]
    density = report["settings"].get("density")
    preset = report["preset"] + (f" at density {density:g}" if density else "")
    return f"{preset} against dense attention" if "comparison" in report else f"{preset} attention"


def _subtitle(report: dict[str, Any], count: int, missing: int) -> str:
    settings = report["settings"]
    parts = [f"{settings['frames']} frames, {settings['width']} \u00d7 {settings['height']}, {settings['fps']:g} fps"]
    if "model" in settings:
        parts.insert(0, settings["model"])
        parts.append(f"{settings['steps']} steps, seed {settings['seed']}")
        parts.append(report["hardware"].get("gpu") or report["hardware"]["processor"])
        parts.append(f"{count} prompt{'s' if count > 1 else ''}" + (f", {missing} still missing" if missing else ""))
    return " · ".join(parts)


def _headlines(reports: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The figures that answer "how fast and how close", means over the prompts."""
    attention = [entry["attention"] for report in reports for entry in report["runs"].values() if entry["attention"]]
    compared = [report["comparison"] for report in reports if "comparison" in report]
    gains = [entry["speedup"] for entry in compared if "speedup" in entry]
    found = [
        (
            _mean([gain["total"] for gain in gains]),
            "{:.2f}\u00d7",
            "dense's speed",
            "a whole video, loading and compiling apart",
        ),
        (_mean([gain["sparse_step"] for gain in gains]), "{:.2f}\u00d7", "in a sparse step", "median against median"),
        (_mean([entry["psnr"]["mean"] for entry in compared]), "{:.1f} dB", "PSNR", "mean over frames"),
        (_mean([entry["ssim"]["mean"] for entry in compared]), "{:.3f}", "SSIM", "mean over frames; 1 is equal"),
        (
            _mean([entry["flicker"]["mean"] for entry in compared if "flicker" in entry]),
            "{:.1f}",
            "flicker",
            "other changes from frame to frame, of 255; 0 is equal",
        ),
        (
            _mean([entry["density_run"] for entry in attention]),
            "{:.2f}",
            "density",
            "attention work of the run; 1 is dense",
        ),
    ]
    known = [entry for entry in found if entry[0] is not None]
    return [{"value": form.format(value), "name": name, "hint": hint} for value, form, name, hint in known]


def _section(folder: Path, report: dict[str, Any], budget: int) -> dict[str, Any]:
    videos, files = report["videos"], report["files"]
    base = folder if report["folder"] == "." else folder / report["folder"]
    link = "" if report["folder"] == "." else report["folder"] + "/"
    name = files.get("side_by_side") or next(iter(videos.values()))
    size = (base / name).stat().st_size
    embedded = size <= budget
    strip = base / files["filmstrip"] if "filmstrip" in files else None
    warnings = list(report.get("warnings", []))
    warnings += [f"{key}: {text}" for key, entry in report["runs"].items() for text in entry["warnings"]]
    return {
        "heading": _heading(report),
        "video": data_uri("video/mp4", (base / name).read_bytes()) if embedded else None,
        "video_bytes": size if embedded else 0,
        "sound": _has_sound(report),
        "max_width": None if "side_by_side" in files else max(384, 2 * report["settings"]["width"]),
        "links": [*_links(videos, link), *((key.replace("_", " "), file) for key, file in _links(files, link))],
        "strip": data_uri("image/png", strip.read_bytes()) if strip else None,
        "overlay": data_uri("image/png", (base / files["attention"]).read_bytes()) if "attention" in files else None,
        "warnings": warnings,
        "quality": _quality(report.get("comparison")),
        "columns": list(report["runs"]),
        "rows": _run_rows(report["runs"]),
        "notes": [line for entry in report["runs"].values() if (line := _dense_line(entry))],
        "plots": _plots(report),
    }


def _has_sound(report: dict[str, Any]) -> bool:
    """Whether the video that the report shows has sound."""
    if "side_by_side" in report["files"]:
        return "sound" in report["comparison"]
    return any("sound" in entry for entry in report["runs"].values())


def _heading(report: dict[str, Any]) -> str:
    prompt = report.get("prompt", "")
    return f"{prompt} (seed {report['seed']})" if report["settings"].get("samples", 1) > 1 else prompt


def _links(files: dict[str, str], folder: str) -> list[tuple[str, str]]:
    return [(name, folder + file) for name, file in files.items()]


def _quality(comparison: dict[str, Any] | None) -> list[tuple[str, str]]:
    if comparison is None:
        return []
    psnr, ssim, lpips = comparison["psnr"], comparison["ssim"], comparison["lpips"]
    rows = [
        ("PSNR, mean over frames", _number(psnr["mean"], "{:.2f} dB")),
        ("PSNR, worst frame", _number(psnr["worst"], "{:.2f} dB")),
        ("SSIM, mean over frames", _number(ssim["mean"], "{:.4f}")),
        ("SSIM, worst frame", _number(ssim["worst"], "{:.4f}")),
    ]
    if psnr["identical_frames"]:
        rows.insert(2, ("Equal frames, not in the PSNR", str(psnr["identical_frames"])))
    flicker = comparison.get("flicker")  # this and VMAF are absent from reports of earlier versions
    if flicker:
        change = flicker["change"]
        rows.append(("Flicker, mean over frames; 0 is equal", _number(flicker["mean"], "{:.2f} of 255")))
        rows.append(("Flicker, worst frame", _number(flicker["worst"], "{:.2f} of 255")))
        rows.append(("Change from frame to frame, against the reference", _number(change["ratio"], "{:.2f}\u00d7")))
    measured = _number(lpips["mean"], "{:.4f}")
    rows.append(("LPIPS (AlexNet)", f"not measured: {lpips['reason']}" if lpips["reason"] else measured))
    vmaf = comparison.get("vmaf")
    if vmaf:
        measured = _number(vmaf["mean"], "{:.1f} of 100")
        rows.append(("VMAF, mean over frames", f"not measured: {vmaf['reason']}" if vmaf["reason"] else measured))
    if "sound" in comparison:
        rows.append(("Sound of the side by side", f"that of {comparison['sound']}"))
    return rows


def _run_rows(runs: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Label and one cell a run; rows that nobody has are left out."""

    def row(label: str, form: str, *keys: str) -> tuple[str, list[str]]:
        cells = []
        for entry in runs.values():
            value: Any = entry
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            cells.append(_number(value, form))
        return label, cells

    rows = [
        row("Seconds in all", "{:.1f}", "seconds", "total"),
        row("Text encoding and preparation", "{:.2f}", "seconds", "prepare"),
        row("Denoising", "{:.1f}", "seconds", "denoise"),
        row("A step, median", "{:.3f}", "seconds", "median_step"),
        row("A sparse step, median", "{:.3f}", "seconds", "median_sparse_step"),
        row("Decoding", "{:.2f}", "seconds", "decode"),
        row("Sound, seconds", "{:.2f}", "sound", "seconds"),
        row("Sound, samples a second", "{}", "sound", "rate"),
        row("Peak GPU memory, GiB", "{:.2f}", "peak_memory_gib"),
        row("First steps kept dense", "{}", "attention", "dense_steps"),
        row("Last steps kept dense", "{}", "attention", "dense_last"),
        row("Density, whole run", "{:.3f}", "attention", "density_run"),
        row("Density, sparse calls", "{:.3f}", "attention", "density_sparse"),
        row("Coverage, sparse calls", "{:.3f}", "attention", "coverage_sparse"),
        row("Implementation", "{}", "attention", "implementation"),
    ]
    return [(label, cells) for label, cells in rows if any(cell != ABSENT for cell in cells)]


def _dense_line(run: dict[str, Any]) -> str | None:
    """How much of a sparse run its dense steps are; None for a dense run, and where an earlier version made it."""
    seconds, attention = run["seconds"], run["attention"]
    share = seconds.get("dense_share")
    if attention is None or share is None:
        return None
    steps = len(attention["density"])
    return f"{seconds['dense_steps']} of {steps} steps dense: {100 * share:.0f} % of the denoising time"


def _plots(report: dict[str, Any]) -> list[dict[str, Any]]:
    plots = []
    attention = next((entry["attention"] for entry in report["runs"].values() if entry["attention"]), None)
    if attention:
        svg = value_map(attention["density"], "denoising step", "layer")
        note = "Share of dense attention's work that each layer did: 1 is dense, 0.25 a quarter of it."
        plots.append(_plot("Density by layer and step", note, svg, gradient=True))
    steps = [(name, entry["seconds"]["per_step"]) for name, entry in report["runs"].items()]
    note = "The first step also pays for what is set up once."
    svg = line_plot(steps, "denoising step", "seconds", from_zero=True)
    plots.append(_plot("Seconds a step", note, svg, legend=[name for name, _ in steps]))
    comparison = report.get("comparison")
    if comparison:
        note = "On frames in memory, before video coding." if steps else "On the decoded frames of the two files."
        psnr, ssim = comparison["psnr"]["per_frame"], comparison["ssim"]["per_frame"]
        plots.append(_plot("PSNR by frame, dB", note, line_plot([("", []), ("PSNR", psnr)], "frame", "PSNR", span=3)))
        plots.append(
            _plot("SSIM by frame", "1 is equal.", line_plot([("", []), ("SSIM", ssim)], "frame", "SSIM", span=0.03))
        )
        if "flicker" in comparison:
            flicker = [("", []), ("flicker", comparison["flicker"]["per_frame"])]
            svg = line_plot(flicker, "frame", "flicker", from_zero=True)
            plots.append(_plot("Flicker by frame, grey levels of 255", FLICKER_NOTE, svg))
    return [plot for plot in plots if plot["svg"]]


def _plot(title: str, note: str, svg: str, legend: list[str] | None = None, gradient: bool = False) -> dict[str, Any]:
    shown = legend if legend and len(legend) > 1 else []
    return {"title": title, "note": note, "svg": svg, "legend": shown, "gradient": gradient}


def _facts(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    apart = ("preset_rules", "preset_2_rules", "loras")
    settings = {key: value for key, value in report["settings"].items() if key not in apart}
    groups = [("Settings", settings), ("Preset", report["settings"].get("preset_rules") or {})]
    groups.append(("Preset of the second transformer", report["settings"].get("preset_2_rules") or {}))
    loras = enumerate(report["settings"].get("loras", []), start=1)
    groups.append(("LoRA", {str(number): _lora(entry) for number, entry in loras}))
    machine = dict(report["hardware"])
    if "load_seconds" in report:
        machine["load_seconds"] = round(report["load_seconds"], 2)
    groups += [("Machine", machine), ("Versions", report["versions"])]
    return [
        (name, [(key.replace("_", " "), _plain(value)) for key, value in group.items()])
        for name, group in groups
        if group
    ]


def _lora(entry: dict[str, Any]) -> str:
    where = " and ".join(entry["into"])
    return f"{entry['lora']}, weight {entry['weight']:g}, in {where}, SHA-256 {entry['digest']}\u2026"


def _plain(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value or "(empty)"
    return json.dumps(value, ensure_ascii=False)


def _number(value: Any, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
