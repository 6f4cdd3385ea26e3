"""Finds the steps that a rule for steps names: by number, or as shares of a run, because runs differ in length."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
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


def possible_sets(rules: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """All results that `rules_at` can have, over the steps of runs of any length."""
    ranges = [part for match in rules for part in step_ranges(match)]
    steps, places = _borders(ranges, shares=False), _borders(ranges, shares=True)
    found: dict[tuple[int, ...], None] = {}
    for first, end in zip(steps, [*steps[1:], None], strict=True):
        for place, place_end in pairwise([*places, Fraction(1)]):
            if end is None or any(_can_be_in(int(step), place, place_end) for step in range(int(first), int(end))):
                found[_covering(rules, int(first), place)] = None
    return tuple(found)


def _covering(rules: Sequence[str], step: int, place: Fraction) -> tuple[int, ...]:
    return tuple(
        index for index, match in enumerate(rules) if any(part.covers(step, place) for part in step_ranges(match))
    )


def _borders(ranges: Iterable[StepRange], shares: bool) -> list[Fraction]:
    """The sorted places where ranges of one kind begin or end, with 0 and without the end of the run."""
    borders = {border for part in ranges if part.shares == shares for border in part[:2] if border is not None}
    return sorted({Fraction(0), *(border for border in borders if not shares or border < 1)})


def _can_be_in(step: int, place: Fraction, end: Fraction) -> bool:
    """Whether there is a run in which a step, counted from 0, has a place from `place` up to `end`."""
    shortest = max(step + 1, step // end + 1)  # the run in which it comes latest, but before the end
    return Fraction(step, shortest) >= place
