"""Tiny random pipelines of every model family, and the presets and comparisons that their tests share."""

from psa_testing.tiny_families.cases import CASES, WAN, Case
from psa_testing.tiny_families.expectations import EVERYTHING, ONE_EACH, SPARSE, assert_equal_to_rounding, preset

__all__ = ["CASES", "EVERYTHING", "ONE_EACH", "SPARSE", "WAN", "Case", "assert_equal_to_rounding", "preset"]
