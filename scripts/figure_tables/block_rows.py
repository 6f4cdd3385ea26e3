"""The rows of check_blocks.py as a table."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    titles = ["checkpoint", "heads x dim", "tokens", "dense phase", "kept, error", "psa-3, error", "density"]
    titles += ["implementation", "dense, ms", "psa-3, ms", "peak GiB, dense", "psa-3", "failed"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} |{' |' * (len(titles) - 2)} {row['error'].replace('|', '/')} |")
            continue
        cells = [row["name"], f"{row['heads']} x {row['head_dim']}", f"{row['tokens']:,}"]
        cells += ["identical" if row["identical"] else "differs", f"{row['kept_error']:.1e}", f"{row['psa_error']:.2f}"]
        cells += ["" if row["density"] is None else f"{row['density']:.3f}", row["implementation"] or ""]
        figures = (row["dense_ms"], row["psa_ms"], row["dense_peak_gib"], row["psa_peak_gib"])
        cells += ["" if figure is None else str(figure) for figure in figures]
        lines.append(f"| {' | '.join(cells)} | {'; '.join(row['failed'])} |")
    return "\n".join(lines)
