"""What reaches the C launcher of the installed Triton by the short way, beside what its own runner passes there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from psa_kernels import triton_runner
from psa_kernels.triton_launch import Rows
from psa_kernels.triton_runner import runner

triton = pytest.importorskip("triton")

GRID, STREAM, FUNCTION, METADATA = (3, 2, 1), 77, 88, (4, 1, 1024)


@pytest.fixture
def compiled(monkeypatch):
    """A compiled kernel whose C launcher notes what it is passed."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    launcher = CudaLauncher.__new__(CudaLauncher)
    settings = {
        "launch": lambda *arguments: launcher.noted.append(arguments), "noted": [], "num_ctas": 1,
        "global_scratch_size": 0, "global_scratch_align": 1, "profile_scratch_size": 0, "profile_scratch_align": 1,
        "launch_cooperative_grid": False, "launch_pdl": True, "gsan_enabled": False,
    }  # fmt: skip
    if not triton.__version__.startswith("3.6."):
        settings |= {"arg_annotations": ["annotation"], "kernel_signature": b"signature"}
    vars(launcher).update(settings)
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: STREAM + device)
    monkeypatch.setattr(driver, "_active", device)
    kernel = CompiledKernel.__new__(CompiledKernel)
    vars(kernel).update(
        _run=launcher, module=1, function=FUNCTION, packed_metadata=METADATA, src=None, name="kernel", metadata=None
    )
    yield kernel
    kernel.module = None  # newer versions unload what has one


def without_hooks(arguments):
    """Arguments with None for the hooks, none of which is there, and for what they would be told."""
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    place = next(index for index, each in enumerate(arguments) if each is hooks[0])
    assert arguments[place + 1] is hooks[1]
    return (*arguments[: place - 1], None, None, None, *arguments[place + 2 :])


def test_the_short_way_ends_in_the_same_call(compiled):
    given, noted = [128, 0, 7, 0.5, (1, 2)], compiled.run.noted
    compiled[GRID](*given)
    run = runner(compiled, GRID)
    run(given)
    assert len(noted) == 2 and noted[1] == without_hooks(noted[0]) and noted[1] != noted[0]
    assert noted[1][:5] == (*GRID, STREAM, FUNCTION)


def test_hooks_are_told_of_launches(compiled):
    from triton import knobs

    def hook(metadata):
        raise AssertionError("a stub launcher calls no hooks")

    run, noted = runner(compiled, GRID), compiled.run.noted
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        run([128])
        assert knobs.runtime.launch_enter_hook in noted[-1]
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    run([128])
    assert knobs.runtime.launch_enter_hook not in noted[-1]


@pytest.mark.parametrize("change", ["scratch", "profile", "gsan", "version", "class"])
def test_what_is_not_as_known_goes_the_way_of_triton(compiled, change, monkeypatch):
    launcher = compiled.run
    if change == "scratch":
        launcher.global_scratch_size = None
    elif change == "profile":
        del launcher.profile_scratch_size
    elif change == "gsan":
        launcher.gsan_enabled = True
    elif change == "version":
        monkeypatch.setattr(triton, "__version__", "4.0.0")
    else:
        compiled._run = SimpleNamespace(**vars(launcher))
    used = []
    monkeypatch.setattr(type(compiled), "__getitem__", lambda self, grid: lambda *given: used.append((grid, given)))
    runner(compiled, GRID)([128, 7])
    assert used == [(GRID, (128, 7))] and not launcher.noted


def test_a_descriptor_is_made_once_for_each_place_and_address(compiled, monkeypatch):
    if not triton.__version__.startswith(triton_runner.FIRST_ORDER):
        pytest.skip("other versions of Triton make them at each launch")
    from triton.backends.nvidia import driver

    class Described(Rows):
        def descriptor(self):
            raise AssertionError("asked of a prepared launch")

    def rows(address, width=16):
        return Described(address, (4, width), (width, 1))

    made = []
    monkeypatch.setattr(triton_runner, "KEPT_DESCRIPTORS", 3)
    triton.runtime.driver.active.utils = SimpleNamespace(
        fill_tma_descriptor=lambda address, *others: made.append(address) or ("map", address, *others)
    )
    launcher, signature = compiled.run, {0: "*bf16", 1: "tensordesc<x>", 2: "constexpr", 3: "tensordesc<y>", 4: "i32"}
    metadata = [
        {"swizzle": swizzle, "elem_size": 2, "elem_type": 10, "block_size": [2, 16], "fp4_padded": False}
        for swizzle in (1, 3)
    ]
    launcher.launch = driver.wrap_handle_tensordesc(launcher.launch, signature, metadata)
    run = runner(compiled, GRID)
    for first, second in ((16, 32), (16, 32), (32, 16), (16, 64)):
        given = [128, rows(first), 2, rows(second, 32), 7]
        compiled[GRID](*given)
        by_triton = launcher.noted.pop()
        asked = len(made)
        run(given)
        assert launcher.noted.pop() == without_hooks(by_triton)
        made[asked - 2 : asked] = []
    assert made == [32, 16, 16, 32, 64, 16]  # the last was kept at first, and dropped when there were three


def test_a_launch_by_addresses_ends_in_the_same_call_as_one_from_tensors(compiled):
    """With descriptors among the arguments, and absent ones between them; whether or not someone listens."""
    import torch
    from triton import knobs
    from triton.backends.nvidia import driver

    from psa_kernels.triton_launch import Launch

    class Described(Rows):
        def descriptor(self):
            return "descriptor"

    def rows(tensor):
        return Described(tensor.data_ptr(), (4, 16), (16, 1))

    first_order = triton.__version__.startswith(triton_runner.FIRST_ORDER)
    if first_order:
        triton.runtime.driver.active.utils = SimpleNamespace(fill_tma_descriptor=lambda *arguments: ("map", *arguments))
        signature = {0: "*bf16", 1: "tensordesc<x>", 2: "constexpr", 3: "tensordesc<y>", 4: "*bf16", 5: "i32"}
        metadata = [
            {"swizzle": swizzle, "elem_size": 2, "elem_type": 10, "block_size": [2, 16], "fp4_padded": False}
            for swizzle in (1, 3)
        ]
        compiled.run.launch = driver.wrap_handle_tensordesc(compiled.run.launch, signature, metadata)

    class Kernel:
        __name__, arg_names = "kernel", ("a", "b", "c", "d", "e", "n", "X")

        def __getitem__(self, grid):
            return lambda *arguments, **constants: compiled

    def plain(noted):
        # What hooks are told is made anew for each launch.
        told = [each for each in noted if type(each).__name__ != "LazyDict"]
        return [(each.address, each.shape, each.strides) if isinstance(each, Rows.__base__) else each for each in told]

    a, b, d, e = (torch.zeros(64) for _ in range(4))
    launch, noted = Launch(Kernel(), GRID, (7,), X=5), compiled.run.noted
    launch(a, rows(b), None, rows(d), e)
    assert launch.prepared and not noted

    def both(*tensors):
        a, b, d, e = tensors
        launch(a, rows(b), None, rows(d), e)
        assert launch.at(a.data_ptr(), b.data_ptr(), 0, d.data_ptr(), e.data_ptr())
        by_addresses, from_tensors = noted.pop(), noted.pop()
        if not first_order:
            *_, by_addresses = by_addresses
            *_, from_tensors = from_tensors
        assert plain(by_addresses) == plain(from_tensors) and not noted
        return by_addresses

    both(a, b, d, e)
    assert both(a, b, d, e)[-2:] == (7, 5)
    short = both(e, d, b, a)

    def hook(metadata):
        raise AssertionError("a stub launcher calls no hooks")

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        told = both(e, d, b, a)
        assert not first_order or knobs.runtime.launch_enter_hook in told
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert told[-2:] == short[-2:]
