"""Triton's interpreter in half of its time: it is spared what it finds out again and again, and what it throws away.

No value that a kernel computes depends on any of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from triton.language import core, semantic
from triton.runtime import interpreter


def quicken(changed: pytest.MonkeyPatch) -> None:
    """Change the interpreter until `changed` undoes it."""
    changed.setattr(interpreter, "_patch_lang", patch_once())
    changed.setattr(interpreter, "_get_np_dtype", remembered_numbers())
    changed.setattr(core, "_type_for_tuple_values", remembered_shapes())
    # It computes all integers a second time, in 64 bits, but compares them only with `debug`, which is off.
    assert not interpreter.InterpreterOptions().debug
    changed.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)


def patch_once() -> Callable[..., Any]:
    """Each call of a function inside a kernel patches `triton.language`: once for each module a launch will do."""
    patched = set()
    patch = interpreter._patch_lang

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            patched.clear()
            super().restore()

    def patch_lang(function):
        scope = Scope()
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            scope._changes = patch(function)._changes
        return scope

    return patch_lang


def remembered_numbers() -> Callable[..., Any]:
    """A table of all types is made whenever one is looked up."""
    look_up, known = interpreter._get_np_dtype, {}

    def numpy_type(of):
        scalar = of.scalar
        if scalar.is_ptr():
            return look_up(scalar)
        if scalar.name not in known:
            known[scalar.name] = look_up(scalar)
        return known[scalar.name]

    return numpy_type


def remembered_shapes() -> Callable[..., Any]:
    """Each block makes the type of its shape, whose name is put together anew. Shapes are few."""
    make, known = core._type_for_tuple_values, {}

    def type_of_values(values, fields=None):
        plain = tuple([value.value if type(value) is core.constexpr else value for value in values])
        if fields is not None or not all([type(value) is int for value in plain]):
            return make(values, fields)
        if plain not in known:
            known[plain] = make(plain)
        return known[plain]

    return type_of_values
