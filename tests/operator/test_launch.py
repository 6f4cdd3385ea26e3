"""Launches that are prepared once: what a kernel is given then, and when Triton has to look at the arguments again."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch

from psa_kernels.layout import make_layout
from psa_kernels.pyramid.pooled import row_places
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
