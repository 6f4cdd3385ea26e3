"""Looking at callers' variables leaves no trace in their frames, and touches none of them."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.patch.frames import local_variables
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")


class Thing:
    pass


def look(*names):
    return local_variables(sys._getframe(1), names)


def test_a_variable_that_is_deleted_afterwards_dies_at_once():
    kept, gone = Thing(), Thing()
    seen = weakref.ref(gone)
    assert look("kept", "nothing") == {"kept": kept}
    del gone
    assert seen() is None and isinstance(kept, Thing)


def test_a_loop_by_hand_can_free_its_transformer():
    class Editor:
        def generate(self):
            pipe = tiny_wan(num_layers=1)
            apply_psa(pipe, preset(dense_steps=0), strict=True)
            transformer, scheduler = pipe.transformer, pipe.scheduler
            del pipe
            scheduler.set_timesteps(2)
            with torch.no_grad():
                for t in scheduler.timesteps:
                    transformer(torch.randn(1, 16, 3, 8, 8), t.expand(1), torch.randn(1, 16, 32))
            seen = weakref.ref(transformer)
            del transformer
            gc.collect()
            return seen()

    assert Editor().generate() is None


def test_closures_and_arguments_stay():
    def outer(argument):
        shared = Thing()

        def inner():
            nonlocal shared
            found = look("shared")
            shared = found["shared"], argument
            return shared

        assert look("shared", "argument") == {"shared": shared, "argument": argument}
        first = shared
        assert inner() == shared == (first, argument)

    outer(Thing())


def test_a_snapshot_that_somebody_has_stays():
    first = 1
    mine = locals()
    assert look("first") == {"first": 1}
    assert mine["first"] == 1


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="from Python 3.13 on exec puts nothing into a function's frame")
def test_what_exec_has_put_there_stays():
    exec("made = 1")
    assert look("made") == {"made": 1}
    assert locals()["made"] == 1


@pytest.mark.parametrize("watch", ["settrace", "setprofile"])
def test_variables_stay_while_a_debugger_looks(watch):
    """After each call of it Python writes the snapshot into the variables."""
    looked = []

    def hook(frame, event, _argument):
        if frame.f_code is traced.__code__:
            looked.append(local_variables(frame, ("first", "second")))
        return hook

    def traced(first):
        second = [first]
        len(second)  # an event of a profiler
        return first, second

    before = getattr(sys, watch.replace("set", "get"))()
    getattr(sys, watch)(hook)
    try:
        result = traced(1)
    finally:
        getattr(sys, watch)(before)
    assert result == (1, [1]) and {"first": 1, "second": [1]} in looked


def test_modules_and_classes_keep_their_variables():
    space = {"look": look}
    exec("first = 1\nfound = look('first')\nclass A:\n    second = 2\n    found = look('second')", space)
    assert space["first"] == 1 and space["found"] == {"first": 1}
    assert space["A"].second == 2 and space["A"].found == {"second": 2}
