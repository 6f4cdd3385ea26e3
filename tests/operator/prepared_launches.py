"""Kernels that stand in for compiled ones, so that launches by addresses can be followed on a CPU."""

from __future__ import annotations

import ctypes

import torch


class Compiled:
    """What Triton returns of a launch: launches by addresses are noted, and computed if the kernel can be."""

    function = 1

    def __init__(self, kernel, grid, tensors):
        self.kernel, self.grid, self.tensors = kernel, grid, tensors

    def __getitem__(self, grid):
        assert grid == self.grid
        return self.launch

    def launch(self, *arguments):
        count = len(self.tensors)
        self.kernel.launches.append(tuple(getattr(each, "address", each) for each in arguments[:count]))
        if self.kernel.computes:
            given = [at_address(*each) for each in zip(arguments[:count], self.tensors, strict=True)]
            self.kernel.kernel[self.grid](*given, *arguments[count:])


class Kernel:
    """A kernel in place of another, which says that it was compiled when it was launched once.

    Attributes:
        looked_at: the tensors of each launch that went through Triton.
        launches: the addresses of each launch that did not.
    """

    def __init__(self, kernel, computes=False):
        self.kernel, self.computes = kernel, computes
        self.arg_names, self.__name__ = kernel.arg_names, kernel.__name__
        self.looked_at, self.launches = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            tensors = [
                each for each in arguments if each is None or torch.is_tensor(each) or hasattr(each, "block_shape")
            ]
            self.looked_at.append(tensors)
            if self.computes:
                self.kernel[grid](*arguments, **constants)
            return Compiled(self, grid, tensors)

        return run

    def __call__(self, *arguments):
        """Inside another kernel."""
        return self.kernel(*arguments)


def at_address(address, like):
    """A tensor at an address, of the type that was there before; kernels read of it where it begins."""
    if like is None:
        assert address == 0
        return None
    if not address:  # of an empty tensor
        assert not like.numel()
        return like
    buffer = (ctypes.c_char * like.element_size()).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(like.dtype)


def stand_in(monkeypatch, *kernels, computes=False):
    """Put stand-ins in the places of kernels, given as modules and names; plans made with them are not kept."""
    stands = []
    for module, name in kernels:
        stands.append(Kernel(getattr(module, name), computes))
        monkeypatch.setattr(module, name, stands[-1])
        for plan in ("_pooling", "_plan", "_tiling"):
            if hasattr(getattr(module, plan, None), "__wrapped__"):
                monkeypatch.setattr(module, plan, getattr(module, plan).__wrapped__)
    return stands


def count_allocations(monkeypatch):
    """A list that gets the name of each function by which memory is asked of PyTorch."""
    asked = []

    def noting(name, make):
        def noted(*arguments, **options):
            asked.append(name)
            return make(*arguments, **options)

        return noted

    for name in ("empty", "empty_like", "zeros", "zeros_like", "full"):
        monkeypatch.setattr(torch, name, noting(name, getattr(torch, name)))
    return asked
