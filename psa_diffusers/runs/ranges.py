"""Numbers of layers and steps in words."""

from collections.abc import Sequence


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges: "2 to 4, 6" for 2, 3, 4 and 6."""
    borders = [at for at in numbers if at - 1 not in numbers], [at for at in numbers if at + 1 not in numbers]
    parts = (f"{first} to {last}" if first < last else f"{first}" for first, last in zip(*borders, strict=True))
    return ", ".join(parts)
