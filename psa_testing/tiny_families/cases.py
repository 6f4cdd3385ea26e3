"""What the families' pipelines are called with alike."""

from psa_testing.cases import GUIDED, SMALL_TEXT, Case

__all__ = ["GUIDED", "SMALL_TEXT", "Case"]
