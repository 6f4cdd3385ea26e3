"""Fresh random inputs in every run; a failing test prints the seed that repeats it."""

from __future__ import annotations

import os
import random

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    seed = int(os.environ.get("PSA_TEST_SEED") or random.randrange(2**31))
    print(f"repeat with PSA_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)
