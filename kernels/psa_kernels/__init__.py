"""Pyramid Sparse Attention as an operator on tensors; it knows nothing of models or pipelines."""

from psa_kernels.attention import psa_attention, select_blocks
from psa_kernels.lists import AttentionStats, BlockLists
from psa_kernels.spec import AttentionSpec, Importance

__all__ = ["AttentionSpec", "AttentionStats", "BlockLists", "Importance", "psa_attention", "select_blocks"]
