"""How much room the lists of a causal call have."""

from __future__ import annotations

from psa_kernels.lists import list_width
from psa_kernels.spec import AttentionSpec


def causal_list_width(spec: AttentionSpec, key_blocks: int) -> int:
    """How many key blocks a row of a kernel's lists has room for: what any row attends, kept blocks beside the rest."""
    return min(key_blocks, list_width(spec, key_blocks) + spec.keep_first + spec.keep_last)
