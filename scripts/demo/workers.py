"""One process per GPU: gradient averaging and a clock that all of them share. With one process both are trivial."""

import os
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist


def start() -> tuple[int, int, torch.device]:
    """Rank, number of processes and this process's device; several processes come from torchrun."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, count, device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share_weights(modules: Iterable[torch.nn.Module]) -> None:
    """Copies the first process's weights to all."""
    if dist.is_initialized():
        for module in modules:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Averages over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        gradients, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)]
    )


def average(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


class Clock:
    """How much of a phase's seconds is gone, the same number in every process."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.start, self.seconds, self.device = time.monotonic(), seconds, device

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def progress(self) -> float:
        """0..1; waits for the device and the other processes, so ask every few steps."""
        share = torch.tensor(min(1.0, self.elapsed() / self.seconds), device=self.device)
        if dist.is_initialized():
            dist.broadcast(share, 0)
        return share.item()
