"""Bytes of stack that newer versions of Triton give a kernel, by test: known, and left as they are.

No loop that multiplies touches them, which the tests check too, but those that `IN_PRODUCTS` names. Any other stack
is a failure, and any with a version that is not named here.
"""

from __future__ import annotations

KNOWN = {
    "3.7": {
        "test_allocation[90-mass-1182]": 8,
        "test_spread_that_pools[100-(1, 2, 4)-True-True]": 8,
        "test_budget[80-five levels, mean-4725]": 16,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'IN_STEP': True}]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-fp16-{}]": 8,
        "test_kernel_fits_and_overlaps[128-32-(2, 4)-bf16-{'BLOCK_QUERY': 256, 'STORE_LSE': True}]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'GROUP': 7}]": 8,
        "test_kernel_fits_and_overlaps[128-32-(2, 4)-bf16-{'GROUP': 7, 'CAUSAL': True, 'TEXT': True}]": 32,
        "test_attention[90-64]": 48,
    },
    "3.8": {
        "test_attention[86-128-permuted]": 8,
        "test_attention[89-128-permuted]": 8,
        "test_attention[89-96-True-1]": 8,
        "test_attention[89-128-True-1]": 8,
        "test_attention[120-96-True-1]": 8,
        "test_importance[89-4-mean-1]": 8,
        "test_importance[89-8-mean]": 8,
        "test_importance[89-8-mean-1]": 8,
        "test_importance[90-4-max]": 40,
        "test_importance[90-4-max-1]": 40,
        "test_importance[90-4-mean-1]": 24,
        "test_importance[90-8-mean]": 8,
        "test_importance[90-8-mean-1]": 8,
        "test_importance[90-16-mean-1]": 16,
        "test_importance[90-32-max-1]": 8,
        "test_importance[90-32-mean]": 8,
        "test_importance[90-32-mean-1]": 8,
        "test_spread_that_pools[100-(1, 2, 4)-True-True]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'IN_STEP': True}]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-fp16-{}]": 8,
        "test_kernel_fits_and_overlaps[128-32-(2, 4)-bf16-{'BLOCK_QUERY': 256, 'STORE_LSE': True}]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'GROUP': 7}]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'GROUP': 7, 'CAUSAL': True, 'IN_STEP': True}]": 88,
        "test_kernel_fits_and_overlaps[128-32-(2, 4)-bf16-{'GROUP': 7, 'CAUSAL': True, 'TEXT': True}]": 88,
        "test_kernel_fits_and_overlaps[128-128-(1, 2, 4, 8)-fp16-{'GROUP': 4, 'CAUSAL': True}]": 96,
        "test_attention[90-64]": 16,
        "test_prices[80]": 8,
        "test_prices[120]": 24,
    },
    "3.9": {
        "test_attention[86-128-permuted]": 8,
        "test_attention[89-128-permuted]": 8,
        "test_attention[89-96-True-1]": 8,
        "test_attention[89-128-True-1]": 8,
        "test_attention[120-96-True-1]": 16,
        "test_importance[89-4-mean-1]": 8,
        "test_importance[89-8-mean]": 8,
        "test_importance[89-8-mean-1]": 8,
        "test_importance[90-4-max]": 48,
        "test_importance[90-4-max-1]": 48,
        "test_importance[90-4-mean-1]": 176,
        "test_importance[90-8-max]": 16,
        "test_importance[90-8-max-1]": 16,
        "test_importance[90-8-max-7]": 16,
        "test_importance[90-8-mean]": 96,
        "test_importance[90-8-mean-1]": 96,
        "test_importance[90-16-max-1]": 16,
        "test_importance[90-16-mean-1]": 88,
        "test_importance[90-32-max-1]": 16,
        "test_importance[90-32-mean]": 176,
        "test_importance[90-32-mean-1]": 176,
        "test_allocation[90-count-4725]": 8,
        "test_allocation[90-mass-1182]": 16,
        "test_allocation[90-mass-4725]": 48,
        "test_allocation[100-mass-4725]": 48,
        "test_spread_that_pools[100-(1, 2, 4)-True-True]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'IN_STEP': True}]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-fp16-{}]": 8,
        "test_kernel_fits_and_overlaps[128-32-(2, 4)-bf16-{'BLOCK_QUERY': 256, 'STORE_LSE': True}]": 64,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'GROUP': 7}]": 8,
        "test_kernel_fits_and_overlaps[128-64-(1, 2, 4)-bf16-{'GROUP': 7, 'CAUSAL': True, 'IN_STEP': True}]": 24,
        "test_kernel_fits_and_overlaps[128-32-(2, 4)-bf16-{'GROUP': 7, 'CAUSAL': True, 'TEXT': True}]": 8,
        "test_kernel_fits_and_overlaps[128-128-(1, 2, 4, 8)-fp16-{'GROUP': 4, 'CAUSAL': True}]": 16,
        "test_attention[90-64]": 64,
        "test_prices[80]": 8,
    },
}
# How many instructions of a loop that multiplies may touch the stack.
IN_PRODUCTS = {
    ("3.7", "test_attention[90-64]"): 6,
    ("3.9", "test_attention[90-64]"): 1,
}


def known_stack(version: str, case: str) -> tuple[int, int]:
    """Bytes of stack that a test may find, and instructions of its loops that may touch them.

    Args:
        version: of Triton, such as `3.8.0`.
        case: the name of the test with its parameters.
    """
    series = ".".join(version.split(".")[:2])
    return KNOWN.get(series, {}).get(case, 0), IN_PRODUCTS.get((series, case), 0)
