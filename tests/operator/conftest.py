"""What tests of the operator share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from seeds import fresh_inputs

from psa_kernels import devices
from psa_kernels.backends import choose, hopper, triton
from psa_kernels.call import Call
from psa_kernels.layout import make_layout

__all__ = ["fresh_inputs", "on_a_gpu"]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Makes a call whose tensors say to `choose` that they are on a GPU, with a version of Triton that is known."""
    monkeypatch.setattr(hopper, "KNOWN_VERSIONS", ("",))

    def forget():
        for answer in (
            devices.capability,
            devices.is_hopper,
            triton.has_triton,
            triton.triton_version,
            choose._warn_once,
        ):
            answer.cache_clear()

    def make(spec, capability=(9, 0), dtype=torch.bfloat16, tokens=65_536, heads=12, head_dim=128):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        forget()
        x = SimpleNamespace(
            is_cuda=True,
            device=torch.device("cuda"),
            dtype=dtype,
            shape=torch.Size((1, tokens, heads, head_dim)),
            data_ptr=lambda: 0,
            stride=lambda: (tokens * heads * head_dim, heads * head_dim, head_dim, 1),
        )
        return Call(x, x, x, make_layout(tokens, tokens, 0, 0, None), spec, 1.0)

    yield make
    forget()
