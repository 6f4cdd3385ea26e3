"""PSA beside Sol-Attn: time at full size, error of single calls, and videos where they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from attention_judges.rows import error_at
from figure_tables import source
from figure_tables.source import find, load, machine, need, origin, table

CALLS = "benchmarks/sol"
VIDEOS = "quality/sol"
PSA = "psa-auto, not corrected"


@dataclass(frozen=True)
class Method:
    """A method: its title, and its names in the file of calls and in that of videos."""

    title: str
    calls: str
    videos: str


METHODS = (
    Method("`psa-auto`, not corrected", "psa-auto", PSA),
    Method("`psa-auto`", "psa-auto", "psa-auto"),
    Method("`psa-3`", "psa-3", "psa-3"),
    Method("binary (`psa-1`)", "binary", "binary"),
    Method("Sol-Attn's rule, our kernel", "sol-rule top-k", "sol-rule top-k"),
    Method("Sol-Attn, top-k", "sol-int8 top-k", "sol-int8 top-k"),
    Method("Sol-Attn, tau", "sol-int8 tau", "sol-int8 tau"),
)


@dataclass(frozen=True)
class Point:
    """A method at one setting; None is what was not measured.

    Attributes:
        ms, kept_ms: of a whole call, and of one whose lists are kept from an earlier one.
        error: of single calls. The correction of `psa-auto` acts from step to step, so that it has none.
        psnr, psnr_ci, flicker: of videos.
        against, against_ci: PSNR beyond that of `psa-auto`, not corrected, at that density, prompt by prompt.
    """

    method: Method
    setting: float
    density: float
    ms: float | None
    kept_ms: float | None
    error: float | None
    psnr: float | None = None
    psnr_ci: float | None = None
    flicker: float | None = None
    against: float | None = None
    against_ci: float | None = None


def has_videos() -> bool:
    return (source.DOCS / f"{VIDEOS}.json").exists()


def points() -> list[Point]:
    """Everything that is measured, method by method."""
    found = []
    for method in METHODS:
        corrected = method.videos == "psa-auto"
        videos = _videos(method)
        settings = {row["setting"] for row in load(CALLS)["rows"] if row["method"] == method.calls}
        for setting in sorted(videos) if corrected else sorted(settings | set(videos)):
            call, kept = (_call(method, setting, kept) for kept in (False, True))
            video = videos.get(setting)
            if call is None and video is None:
                continue
            found.append(
                Point(
                    method,
                    setting,
                    density=call["density"] if call else video["density"],
                    ms=call and call["ms"],
                    kept_ms=kept and kept["ms"],
                    error=None if corrected else call and call["error"],
                    **_of_video(video),
                )
            )
    return found


def _call(method: Method, setting: float, kept: bool) -> dict[str, Any] | None:
    return find(CALLS, method=method.calls, setting=setting, kept_lists=kept)


def _videos(method: Method) -> dict[float, dict[str, Any]]:
    rows = load(VIDEOS)["rows"] if has_videos() else []
    return {float(row["setting"].split()[-1]): row for row in rows if row["series"] == method.videos}


def _of_video(row: dict[str, Any] | None) -> dict[str, float | None]:
    if row is None:
        return {}
    differs = row["setting"] != row["against"]
    return {
        "psnr": row["psnr"],
        "psnr_ci": row["psnr_ci"],
        "flicker": row["flicker"],
        "against": row["delta_psnr"] if differs else None,
        "against_ci": row["delta_ci"] if differs else None,
    }


def compared() -> str:
    """The one table of the page."""
    head = ["method", "setting", "density", "ms at 14B (lists kept)", "error of single calls"]
    head += ["PSNR of videos, dB", "flicker"] * has_videos()
    body = []
    for point in points():
        ms = "" if point.ms is None else f"{point.ms:.1f}"
        ms += "" if point.kept_ms is None else f" ({point.kept_ms:.1f})"
        cells = [point.method.title, f"{point.setting:.2f}", f"{point.density:.3f}", ms, _digits(point.error)]
        if has_videos():
            cells += ["", ""] if point.psnr is None else [_interval(point.psnr, point.psnr_ci), f"{point.flicker:.1f}"]
        body.append(cells)
    said = [f"[Calls](sol.json): {machine(CALLS)}, {origin(CALLS)}."]
    if has_videos():
        prompts = load(VIDEOS)["prompts"]
        said.append(f"[Videos](../{VIDEOS}.json): {prompts} prompts, {machine(VIDEOS)}, {origin(VIDEOS)}.")
    else:
        said.append("Videos are not measured yet.")
    return f"{table(head, body)}\n\n{' '.join(said)}"


def ahead() -> str:
    """Where Sol-Attn is ahead and where it is not: at equal density, and at equal time."""
    by_kind = {(point.method.videos, point.setting): point for point in points() if point.error is not None}
    ours = [point for (kind, _), point in by_kind.items() if kind == PSA]
    sol = [point for (kind, _), point in by_kind.items() if kind.startswith("sol-int8")]
    pairs = [(by_kind[key], our) for our in ours if (key := ("sol-int8 top-k", our.setting)) in by_kind]
    lines = [
        "- **Equal density, single calls** (Sol-Attn's top-k, then `psa-auto`): "
        + ", ".join(f"{_bold_least(theirs.error, our.error)} at {our.setting:.2f}" for theirs, our in pairs),
        "- **Equal time, single calls** (Sol-Attn, then `psa-auto` in no more time): "
        + ", ".join(_at_time(point, ours) for point in sol),
    ]
    paired = [(theirs, our) for theirs, our in pairs if theirs.against is not None]
    if paired:
        lines.append(
            "- **Equal density, videos**: PSNR of Sol-Attn's top-k beyond that of `psa-auto`, not corrected, prompt by "
            "prompt, in dB: "
            + ", ".join(
                f"{_interval(theirs.against, theirs.against_ci, '+')} at {our.setting:.2f}" for theirs, our in paired
            )
        )
    shown, known = ([point for point in some if point.psnr is not None] for some in (sol, ours))
    if shown and known:
        lines.append(
            "- **Equal time, videos**, PSNR in dB (Sol-Attn, then `psa-auto`, not corrected, in no more time): "
            + ", ".join(f"{point.psnr:.1f} and {_psnr_at(point.ms, known):.1f} in {point.ms:.0f} ms" for point in shown)
        )
    return "\n".join(f"{line}." for line in lines)


def _at_time(point: Point, ours: list[Point]) -> str:
    longest = max(our.ms for our in ours)
    error = error_at(min(point.ms, longest), [our.ms for our in ours], [our.error for our in ours])
    return f"{_bold_least(point.error, error)} in {point.ms:.0f} ms"


def _bold_least(theirs: float, ours: float) -> str:
    cells = [f"**{_digits(x)}**" if x == min(theirs, ours) else _digits(x) for x in (theirs, ours)]
    return " and ".join(cells)


def _psnr_at(ms: float, ours: list[Point]) -> float:
    """PSNR that a method has at a time: straight between measured times, and that of the nearest one beyond them."""
    known = sorted((our.ms, our.psnr) for our in ours)
    return float(np.interp(ms, *zip(*known, strict=True)))


def _interval(value: float, half: float | None, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def _digits(error: float | None) -> str:
    return "" if error is None else f"{error:.3f}"


def rival() -> str:
    """psa-auto and Sol-Attn in about the same time, each at the setting that comes nearest."""
    ours = need(CALLS, method="psa-auto", setting=0.25, kept_lists=False)
    theirs = need(CALLS, method="sol-int8 top-k", setting=0.1)
    videos = {row["setting"]: row["psnr"] for row in load(VIDEOS)["rows"]}
    return (
        f"At {ours['ms']:.0f} ms a call of Wan2.1-14B's size, videos of the demo model by `psa-auto` have a PSNR of "
        f"{videos['psa-auto 0.25']:.1f} dB\nagainst dense ones; "
        f"by the INT8 kernel of Sol-Attn, which engines build in, {videos['sol-int8 top-k 0.1']:.1f} dB at "
        f"{theirs['ms']:.0f} ms."
    )
