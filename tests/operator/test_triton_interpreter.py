"""The Triton kernels on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("cases", ["triton_cases.py", "triton_budget_cases.py", "triton_int8_cases.py"])
def test_kernels_agree_with_the_reference(cases):
    """One process of its own: the interpreter is switched on for all of a process, before triton is imported."""
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / cases)],
        cwd=here.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
