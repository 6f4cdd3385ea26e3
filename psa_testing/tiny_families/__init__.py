"""Tiny random pipelines of every model family, and the presets and comparisons that their tests share."""

from psa_testing.cases import Case
from psa_testing.expectations import EVERYTHING, SPARSE, assert_equal_to_rounding, preset
from psa_testing.families import CASES, ONE_EACH

WAN = CASES["wan"]

__all__ = ["CASES", "EVERYTHING", "ONE_EACH", "SPARSE", "WAN", "Case", "assert_equal_to_rounding", "preset"]
