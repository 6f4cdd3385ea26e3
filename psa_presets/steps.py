"""Finds the steps that a rule for steps names: by number, or as shares of a run, because runs differ in length."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

MAX_PARTS = 20
MAX_STEP = 999

_NUMBER = r"[0-9]{1,3}(?:\.[0-9]{1,3})?"
_PART = re.compile(
    rf"\s*(?P<first>{_NUMBER})\s*(?P<share>%)?\s*(?P<dash>-\s*(?:(?P<last>{_NUMBER})\s*(?P<share_last>%)?\s*)?)?"
)


class StepRange(NamedTuple):
    """A stretch of a run, from `start` up to but without `end`; to the run's end if that is None.

    Attributes:
        shares: whether both are shares of the run; then a step counts as being where it begins. Else they are steps,
            counted from 0.
    """

    start: Fraction
    end: Fraction | None
    shares: bool

    def covers(self, step: int, place: Fraction) -> bool:
        """Whether the stretch contains a step. `place` is the step's number divided by the number of all steps."""
        at = place if self.shares else step
        return self.start <= at and (self.end is None or at < self.end)


@functools.lru_cache(maxsize=256)
def step_ranges(match: str) -> tuple[StepRange, ...]:
    """The parts of the `match` of a rule for steps; ValueError if it is malformed."""
    parts = match.split(",")
    if len(parts) > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS} parts")
    return tuple(_step_range(part) for part in parts)


def _step_range(part: str) -> StepRange:
    found = _PART.fullmatch(part)
    if found is None:
        raise ValueError("not a list of steps")
    first, last = Fraction(found["first"]), Fraction(found["last"]) if found["last"] else None
    if found["share"] or found["share_last"]:
        if not found["dash"]:
            raise ValueError(f"{found['first']}% is a place in the run, and no range of steps")
        if last is not None and not found["share_last"]:
            raise ValueError("from a share to a number of a step")
        if max(first, last or 0) > 100:
            raise ValueError("a share above 100%")
        end = Fraction(100) if last is None else last
        if end <= first:
            raise ValueError(f"nothing is between {float(first):g}% and {float(end):g}%")
        return StepRange(first / 100, end / 100, shares=True)
    if first.denominator > 1 or (last is not None and last.denominator > 1):
        raise ValueError("not a list of steps")
    if not found["dash"]:
        return StepRange(first, first + 1, shares=False)
    if last is not None and last < first:
        raise ValueError(f"{first}-{last} runs backwards")
    return StepRange(first, None if last is None else last + 1, shares=False)


def rules_at(rules: Sequence[str], step: int, num_steps: int) -> tuple[int, ...]:
    """The numbers of the rules that contain a step of a run; each rule is given as its `match`."""
    return _covering(rules, step, Fraction(step, num_steps))


class Cell(NamedTuple):
    """Steps of runs of any length to which the same rules apply.

    Attributes:
        rules: the numbers of these rules.
        first, end: steps from `first` up to but without `end`; any later one if that is None.
        place, place_end: only steps that begin from `place` up to but without `place_end`, as shares of the run.
    """

    rules: tuple[int, ...]
    first: int
    end: int | None
    place: Fraction
    place_end: Fraction

    def longest_runs(self, after: int = 0) -> Iterator[tuple[int, int]]:
        """Each step of the cell with the steps of the longest run that has it there; of a cell without end, one step.

        Where runs may be of any length, it is one in which more than `after` steps come after the step.
        """
        middle = (self.place + self.place_end) / 2
        long = math.ceil(8 * (max(self.first, self.end or 0, after) + 1) / (self.place_end - self.place))
        if self.end is None:
            yield math.floor(middle * long), long
            return
        for step in range(self.first, self.end):
            steps = math.floor(step / self.place) if self.place else long
            if step < steps * self.place_end:
                yield step, steps


def cells(
    rules: Sequence[str], first: int = 0, place: Fraction = Fraction(0), place_end: Fraction = Fraction(1)
) -> Iterator[Cell]:
    """The cells into which rules, each given as its `match`, cut the steps of runs. A cell may contain no step.

    Args:
        first: only steps from this one on.
        place, place_end: only steps that begin between these shares of the run.
    """
    ranges = [part for match in rules for part in step_ranges(match)]
    steps = _borders(ranges, False, Fraction(first), None)
    places = [*_borders(ranges, True, place, place_end), place_end] if place < place_end else []
    for start, end in zip(steps, [*steps[1:], None], strict=True):
        for begins, ends in pairwise(places):
            covering = _covering(rules, int(start), begins)
            yield Cell(covering, int(start), None if end is None else int(end), begins, ends)


def possible_sets(rules: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """All results that `rules_at` can have, over the steps of runs of any length."""
    return tuple(dict.fromkeys(cell.rules for cell in cells(rules) if any(cell.longest_runs())))


def _covering(rules: Sequence[str], step: int, place: Fraction) -> tuple[int, ...]:
    return tuple(
        index for index, match in enumerate(rules) if any(part.covers(step, place) for part in step_ranges(match))
    )


def _borders(ranges: Iterable[StepRange], shares: bool, first: Fraction, end: Fraction | None) -> list[Fraction]:
    """The sorted places where ranges of one kind begin or end, from `first`, which is among them, and before `end`."""
    borders = {border for part in ranges if part.shares == shares for border in part[:2] if border is not None}
    return sorted({first, *(border for border in borders if first < border and (end is None or border < end))})
