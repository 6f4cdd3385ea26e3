"""Tables of what attention costs in quality."""

from __future__ import annotations

from figure_tables.source import load, table

HELD_OUT = "quality/held-out"
SERIES = {"psa-3": "`psa-3`", "not corrected": "`psa-auto`, not corrected", "psa-auto": "**`psa-auto`**"}


def held_out() -> str:
    """psa-auto and psa-3 on prompts of a seed of their own."""
    rows = {(row["series"], row["setting"].split()[-1]): row for row in load(HELD_OUT)["rows"]}
    body = []
    for share in dict.fromkeys(share for _, share in rows):
        for series, title in SERIES.items():
            row = rows[series, share]
            gain = "" if series == "psa-3" else f"{row['delta_psnr']:+.1f} ± {row['delta_ci']:.1f}"
            cells = [f"{row['psnr']:.1f}", gain, f"{row['flicker']:.1f}"]
            body.append([title, f"{row['density']:.3f}", *(f"**{x}**" if series == "psa-auto" else x for x in cells)])
    return table(["", "density", "PSNR", "to `psa-3`", "flicker"], body)
