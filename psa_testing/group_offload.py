"""Group offload onto a CPU, which some versions of diffusers allow only where there is an accelerator too."""

from typing import Any

import pytest
import torch


def offload_groups(transformer: Any) -> None:
    """Switch it on, leaf by leaf."""
    cpu = torch.device("cpu")
    try:
        transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    except AttributeError as error:  # 0.36: no accelerator has no type
        if "'NoneType' object has no attribute 'type'" not in str(error):
            raise
        pytest.skip("this diffusers needs an accelerator for group offload")
