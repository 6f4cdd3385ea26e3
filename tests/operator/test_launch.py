"""Launches that are prepared once: what a kernel is given then, and when Triton has to look at the arguments again."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch

from psa_kernels import triton_launch
from psa_kernels.layout import make_layout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid.pooled import TritonPyramid, row_places
from psa_kernels.spec import AttentionSpec
from psa_kernels.triton_launch import Launch, Rows


class Compiled:
    """What Triton returns of a launch."""

    function = 1

    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """A kernel of two tensors, two numbers and two constants, which notes what it is given."""

    __name__ = "kernel"
    arg_names = ("x", "y", "n", "m", "A", "B")

    def __init__(self, compiles=True):
        self.looked_at, self.launched, self.compiles = [], [], compiles

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.looked_at.append((grid, arguments, constants))
            return Compiled(self.launched) if self.compiles else None

        return run


def test_arguments_are_looked_at_once():
    kernel, x, y = Kernel(), torch.zeros(64), torch.ones(64)
    launch = Launch(kernel, (3, 2), (7, 0.5), B=4, A=2, num_warps=8)
    launch(x, None)
    assert kernel.looked_at == [((3, 2, 1), (x, None, 7, 0.5), {"A": 2, "B": 4, "num_warps": 8})]
    launch(y, None)
    assert kernel.launched == [((3, 2, 1), (y.data_ptr(), 0, 7, 0.5, 2, 4))] and len(kernel.looked_at) == 1


def test_addresses_between_multiples_of_16_bytes_are_looked_at_each_time():
    kernel, x = Kernel(), torch.zeros(64)
    launch = Launch(kernel, (1,), (7, 0.5), A=2, B=4)
    for _ in range(2):
        launch(x[1:], x)
    assert len(kernel.looked_at) == 2 and not kernel.launched
    launch(x, x)  # what the two before compiled for is not what this one may take
    launch(x, x)
    launch(x, x[3:])
    assert len(kernel.looked_at) == 4 and len(kernel.launched) == 1


def test_a_call_whose_tensors_are_not_aligned_is_not_said_to_be():
    kernel, x = Kernel(), torch.zeros(64)
    kernel.arg_names = (*kernel.arg_names, "ALIGNED")
    launch = Launch(kernel, (1,), (7, 0.5), A=2, B=4, ALIGNED=True)
    launch(x[1:], None)
    launch(x, None)
    launch(x[4:], None)
    assert [constants["ALIGNED"] for _, _, constants in kernel.looked_at] == [False, True]
    assert kernel.launched == [((1, 1, 1), (x[4:].data_ptr(), 0, 7, 0.5, 2, 4, True))]


def test_an_interpreter_compiles_nothing():
    kernel, x = Kernel(compiles=False), torch.zeros(64)
    launch = Launch(kernel, (1,), (7, 0.5), A=2, B=4)
    launch(x, x)
    launch(x, x)
    assert len(kernel.looked_at) == 2 and not kernel.launched


def test_a_descriptor_is_made_where_it_is_looked_at_only():
    made = []

    class Described(Rows):
        def descriptor(self):
            made.append(self.shape)
            return "descriptor"

    kernel, x = Kernel(), torch.zeros(64)
    rows = Described(x.data_ptr(), (4, 16), (16, 1))
    assert rows.base.data_ptr() == x.data_ptr() and rows.padding == "zero"
    launch = Launch(kernel, (1,), (7, 0.5), A=2, B=4)
    launch(rows, x)
    assert kernel.looked_at[0][1] == ("descriptor", x, 7, 0.5)
    launch(rows, x)
    assert kernel.launched[0][1] == (rows, x.data_ptr(), 7, 0.5, 2, 4) and made == [(4, 16)]


def test_the_installed_triton_reads_of_rows_what_it_reads_of_a_descriptor(monkeypatch):
    """What its launcher makes of both, where the two halves of the driver that need a GPU only note their arguments."""
    pytest.importorskip("triton")
    from triton.backends.nvidia import driver

    from psa_kernels.sparse.hopper.launch import Boxes

    noted = []
    utils = SimpleNamespace(
        fill_tma_descriptor=lambda *arguments: noted.append(arguments),
        fill_tma_descriptor_tiled=lambda *arguments: noted.append(arguments),
    )
    stand_in = SimpleNamespace(active=SimpleNamespace(utils=utils))
    monkeypatch.setattr(driver.triton.runtime, "driver", stand_in)
    metadata = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 32, 64], "fp4_padded": False}
    x = torch.zeros(2, 40, 3, 64, dtype=torch.bfloat16)
    rows = Boxes(x, 3 * 64, (2, 3, 39, 64), (40 * 3 * 64, 64, 3 * 64, 1), 32)
    further = [None] * (len(inspect.signature(driver.make_tensordesc_arg).parameters) - 2)
    of_rows, of_descriptor = (
        driver.make_tensordesc_arg(arg, metadata, *further)[1:] for arg in (rows, rows.descriptor())
    )
    assert len(noted) == 2 and noted[0] == noted[1]
    assert list(of_rows) == list(of_descriptor)


@pytest.mark.parametrize(("before", "after"), itertools.product((0, 3), (0, 5)))
@pytest.mark.parametrize("factors", [(2, 4), (1, 2, 4), (4,)])
def test_rows_of_text_and_levels_are_where_they_are_said_to_be(before, after, factors):
    video, levels = 37, (1, 2, 4)
    tokens = torch.randn(2, before + video + after, 6, 8)[:, :, ::2]
    counts = [-(-video // factor) for factor in factors]
    means = torch.randn(2, 3, sum(counts), 8)
    layout = make_layout(tokens.shape[1], tokens.shape[1], before, after, None)
    of_each = dict(zip(factors, means.split(counts, 2), strict=True))
    heads_first = tokens.transpose(1, 2)
    of_each.setdefault(1, heads_first[:, :, before : before + video])
    if 2 not in of_each:
        levels = (1, 4)
    expected = [heads_first[:, :, :before], heads_first[:, :, before + video :], *(of_each[level] for level in levels)]
    for place, rows in zip(
        row_places(tokens.shape, tokens.stride(), layout.counts, factors, levels), expected, strict=True
    ):
        if rows.shape[2] == 0:
            assert place is None
        else:
            assert torch.equal(place.rows(tokens, means), rows)


def test_a_constant_that_the_kernel_does_not_have_is_refused():
    with pytest.raises(TypeError, match="kernel has no constants C, D"):
        Launch(Kernel(), (1,), (7, 0.5), A=2, B=4, D=1, C=0, num_warps=4)


def test_a_prepared_launch_takes_addresses():
    class Described(Rows):
        def descriptor(self):
            return "descriptor"

    kernel, x, y = Kernel(), torch.zeros(64), torch.ones(64)
    launch = Launch(kernel, (1,), (7, 0.5), A=2, B=4)
    assert not launch.at(x.data_ptr(), 0) and not kernel.looked_at
    launch(Described(x.data_ptr(), (4, 16), (16, 1)), None)
    for _ in range(2):
        assert launch.at(y.data_ptr(), 0)
    (rows, *others), (again, *_) = (arguments for _, arguments in kernel.launched)
    assert others == [0, 7, 0.5, 2, 4] and again is rows
    assert (rows.data_ptr(), rows.shape, rows.strides) == (y.data_ptr(), (4, 16), (16, 1))
    assert rows.base.data_ptr() == y.data_ptr() and rows.padding == "zero" and not hasattr(rows, "descriptor")
    assert not launch.at(y.data_ptr() + 8, 0) and not launch.at(y.data_ptr(), 8)
    assert len(kernel.looked_at) == 1 and len(kernel.launched) == 2


def test_the_rows_that_a_launch_keeps_are_bounded(monkeypatch):
    class Described(Rows):
        def descriptor(self):
            return "descriptor"

    monkeypatch.setattr(triton_launch, "KEPT_ROWS", 3)
    kernel = Kernel()
    launch = Launch(kernel, (1,), (7, 0.5), A=2, B=4)
    launch(Described(16, (4, 16), (16, 1)), None)
    for place in range(1, 9):
        assert launch.at(place * 16, 0) and len(launch._kept) <= 3
    assert [arguments[0].data_ptr() for _, arguments in kernel.launched] == [place * 16 for place in range(1, 9)]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 5)])
@pytest.mark.parametrize("permuted", [False, True])
def test_the_addresses_of_the_hopper_kernel_are_those_of_its_rows(before, after, permuted, monkeypatch):
    pytest.importorskip("triton")
    from psa_kernels.sparse.hopper import launch

    plans, make_plan, given = [], launch._plan, []

    def plan(*arguments):
        made = make_plan(*arguments)
        plans.append(made)
        return made._replace(launch=Unprepared(given))

    class Unprepared:
        def __init__(self, given):
            self.given = given

        def at(self, *addresses):
            self.given.append(addresses)
            return False

        def __call__(self, *tensors):
            self.given.append(tuple(0 if each is None else each.data_ptr() for each in tensors))

    monkeypatch.setattr(launch, "_plan", plan)
    monkeypatch.setattr(launch, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(launch.portable, "launch", lambda *_, **__: None)
    video, spec = 256, AttentionSpec()
    tokens = before + video + after
    q, k, v = (torch.randn(1, tokens, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    wide = torch.randn(1, tokens, 3, 2, 64, dtype=torch.bfloat16)[:, :, 1]
    layout = make_layout(tokens, tokens, before, after, torch.randperm(video) if permuted else None)
    factors = tuple(level for level in spec.levels if level > 1 or permuted)
    means = torch.randn(2, 1, 2, sum(-(-video // factor) for factor in factors), 64).bfloat16()
    lists = BlockLists.from_levels(torch.zeros(1, 2, 2, video // spec.block_key, dtype=torch.int64), len(spec.levels))
    for values, known in ((v, {}), (wide, of_wide := {}), (wide, of_wide)):
        pyramid = TritonPyramid(k, means[0], factors, None, values, means[1])
        launch.sparse_attention(q, pyramid, lists, layout, spec, 0.125, out=torch.empty_like(q), known=known)
        addresses, of_tensors = given[-2:]
        assert addresses == of_tensors and len(set(addresses)) > 10
    assert len(plans) == 2
