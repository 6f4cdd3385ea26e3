"""What `--list` shows: the models by alias with their hub ids, and the presets."""

from collections.abc import Sequence

from psa_diffusers.checkpoints.aliases import MODELS


def listing() -> str:
    """A table of every alias and every shipped preset, one line each."""
    from psa_presets import list_presets, load_preset

    models = [(card.name, card.hub_id or "(bundled)", card.about) for card in MODELS.values()]
    presets = [(name, load_preset(name).source) for name in list_presets()]
    presets.append(("dense", "no sparse attention: the pipeline as it is"))
    return "\n".join(["Models (--model)", *_table(models), "", "Presets (--preset)", *_table(presets)])


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=False)] for row in rows]
    return ["  " + "  ".join([*cells, row[-1]]) for cells, row in zip(padded, rows, strict=True)]
