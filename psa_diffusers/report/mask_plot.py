"""A block mask as a picture: query blocks down, key blocks across, coloured by the pooling factor. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from psa_diffusers.errors import InputError, how_to_install
from psa_diffusers.files import whole_file
from psa_diffusers.patch.masks import BlockMask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FINEST, COARSEST = (0.08, 0.16, 0.36), (0.66, 0.85, 0.86)
SKIPPED = (0.965, 0.965, 0.955)


def require_matplotlib() -> None:
    """Raise an InputError that says what to install, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"matplotlib is not installed; {how_to_install('matplotlib')}") from error


def write_mask_plot(path: Path, mask: BlockMask, prompt: str) -> None:
    """Write the mask of one head as a PNG, whole or not at all."""
    with whole_file(path) as partial:
        mask_figure(mask, prompt).savefig(partial, format="png")


def mask_figure(mask: BlockMask, prompt: str) -> Figure:
    """The mask of the first head as a matplotlib figure, with a legend of the levels and their shares."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    levels = mask.levels[0]
    rows, columns = levels.shape
    colours = level_colours(len(mask.spec.levels))
    figure = Figure(figsize=(9.6, 1.75 + min(8.0, max(2.5, 6.6 * rows / columns))), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    # Few pairs of blocks get one pixel each; many are averaged, because thin lines would get lost otherwise.
    shown = np.array(colours)[levels] if rows * columns > 300_000 else levels
    axes.imshow(
        shown,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        aspect="auto",
        interpolation="antialiased" if shown is not levels else "nearest",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))  # blocks are counted, also where there are few
    frames, height, width = mask.grid
    spec = mask.spec
    axes.set_xlabel(f"key block ({spec.block_key} tokens each, {mask.order.order} order)")
    axes.set_ylabel(f"query block ({spec.block_query} tokens each)")
    short = prompt if len(prompt) <= 90 else prompt[:87] + "..."
    axes.set_title(
        f"{mask.layer}, head {mask.first_head}, step {mask.step + 1} of {mask.steps}  \u00b7  {mask.preset.name}\n"
        f"{short}\n"
        f"{frames} \u00d7 {height} \u00d7 {width} tokens  \u00b7  density {mask.detail()[0].mean():.3f}"
        f"  \u00b7  coverage {coverage(mask):.3f}",
        fontsize=10,
        loc="left",
        parse_math=False,
    )
    patches = [
        Patch(facecolor=colour, edgecolor="0.6", label=f"{name}: {share:.1%}")
        for colour, name, share in zip(colours, level_names(mask), _shares_of_head(mask), strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=10)
    return figure


def level_names(mask: BlockMask) -> list[str]:
    """The legend's words for each level, and for the blocks past the last threshold."""
    names = ["exact" if level == 1 else f"pooled {level}\u00d7" for level in mask.spec.levels]
    return [*names, "one mean a block" if mask.spec.rest == "mean" else "skipped"]


def level_colours(count: int) -> list[tuple[float, float, float]]:
    """From dark for the finest level to light for the coarsest, then nearly white for what is past the last."""
    steps = np.linspace(0, 1, count)[:, None]
    return [*(tuple(colour) for colour in np.array(FINEST) * (1 - steps) + np.array(COARSEST) * steps), SKIPPED]


def coverage(mask: BlockMask) -> float:
    """Share of the pairs of blocks of the first head that are read at all."""
    return 1.0 if mask.spec.rest == "mean" else 1 - _shares_of_head(mask)[-1]


def _shares_of_head(mask: BlockMask) -> list[float]:
    kinds = len(mask.spec.levels) + 1
    return (np.bincount(mask.levels[0].ravel(), minlength=kinds) / mask.levels[0].size).tolist()
