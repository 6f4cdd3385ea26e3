"""Tables of what attention costs in quality."""

from __future__ import annotations

from figure_tables.source import Row, load, table

HELD_OUT = "quality/held-out"
CORRECTED = "quality/corrected"
SERIES = {"psa-3": "`psa-3`", "not corrected": "budget, not corrected", "psa-auto": "**budget, corrected**"}


def held_out() -> str:
    """psa-auto and psa-3 on prompts of a seed of their own."""
    rows = _by_series(HELD_OUT)
    body = []
    for share in dict.fromkeys(share for _, share in rows):
        for series, title in SERIES.items():
            row = rows[series, share]
            gain = "" if series == "psa-3" else f"{row['delta_psnr']:+.1f} ± {row['delta_ci']:.1f}"
            cells = [f"{row['psnr']:.1f}", gain, f"{row['flicker']:.1f}"]
            body.append([title, f"{row['density']:.3f}", *(f"**{x}**" if series == "psa-auto" else x for x in cells)])
    return table(["", "density", "PSNR", "to `psa-3`", "flicker"], body)


def corrected() -> str:
    """What goes well with the correction: differences to psa-3."""
    rows = _by_series(CORRECTED)
    shares = sorted({share for _, share in rows}, key=float)
    body = []
    for series in dict.fromkeys(series for series, _ in rows):
        found = [rows[series, share] for share in shares]
        if series == "psa-3":
            body.append(["`psa-3`: PSNR", *(f"{row['psnr']:.1f}" for row in found)])
        else:
            body.append([series, *(f"{row['delta_psnr']:+.1f} ± {row['delta_ci']:.1f}" for row in found)])
    return table(["", *shares], body)


def _by_series(name: str) -> dict[tuple[str, str], Row]:
    """The rows of docs/<name>.json by their series and density."""
    return {(row["series"], row["setting"].split()[-1]): row for row in load(name)["rows"]}
