"""Tiny random pipelines of the other model families, and the runs that every family is tested with."""

from tiny_families.cases import CASES, Case

__all__ = ["CASES", "Case"]
