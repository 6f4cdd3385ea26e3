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
    """Spare the interpreter a quarter of these tests' time, in which it finds out what it knows.

    It patches `triton.language` at each call of a function inside a kernel, looks at all names, and finds everything
    patched: once for each module a launch will do. And it makes a table of all types whenever it looks one up.
    """
    from triton.runtime import interpreter

    patched = set()
    numbers = {}

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            patched.clear()
            super().restore()

    def patch_once(function, patch=interpreter._patch_lang):
        scope = Scope()
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            scope._changes = patch(function)._changes
        return scope

    def numpy_type(of, look_up=interpreter._get_np_dtype):
        scalar = of.scalar
        if scalar.is_ptr():
            return look_up(scalar)
        if scalar.name not in numbers:
            numbers[scalar.name] = look_up(scalar)
        return numbers[scalar.name]

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(interpreter, "_patch_lang", patch_once)
        changed.setattr(interpreter, "_get_np_dtype", numpy_type)
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
