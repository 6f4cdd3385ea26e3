"""Tests of kernels in Triton's interpreter, which has to be switched on before a process imports triton.

They are a run of their own: `TRITON_INTERPRET=1 python -m pytest tests/interpreter`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "operator"), str(TESTS.parent / "scripts")]

from seeds import fresh_inputs  # noqa: E402

__all__ = ["fresh_inputs"]


def reason_to_skip() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "a run of its own: TRITON_INTERPRET=1 python -m pytest tests/interpreter"
    return None


def pytest_configure(config):
    """What numpy says of the arithmetic of kernels, and of the interpreter's own."""
    if reason_to_skip() is None:
        for ignored in ("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning"):
            config.addinivalue_line("filterwarnings", ignored)


class Skipped(pytest.File):
    def collect(self):
        pytest.skip(reason_to_skip())


def pytest_pycollect_makemodule(module_path, parent):
    """Without the interpreter not even the imports of these files are right."""
    return Skipped.from_parent(parent, path=module_path) if reason_to_skip() else None


@pytest.fixture(autouse=True, scope="session")
def quicker_interpreter():
    from quicker import quicken

    with pytest.MonkeyPatch.context() as changed:
        quicken(changed)
        yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that is not initialized holds what is no number, so that whatever a kernel leaves unwritten shows."""
    import torch

    def poisoned(make):
        def filled(*arguments, **options):
            made = make(*arguments, **options)
            return made.fill_(torch.nan if made.is_floating_point() else 77)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
