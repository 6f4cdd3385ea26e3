"""The place of this process among those that share the prompts of a run."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Which of several processes this is.

    Attributes:
        rank, ranks: its number, and how many processes there are.
        local_rank: its number on this machine, which is also the number of its GPU.
        launch: text that all processes of this run share, and those of no other run; None for a single process.
        reports: whether this process makes the report.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    launch: str | None = None
    reports: bool = True

    def take_device(self, device: str) -> str:
        """The device for this process, made torch's current one if it is a GPU."""
        if self.ranks == 1 or device != "cuda":
            return device
        import torch

        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"


ALONE = Place()


def launched_place() -> Place:
    """This process's place among those that `accelerate launch` or torchrun started, read from the environment."""
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if ranks == 1:
        return ALONE
    launch = f"{os.environ.get('MASTER_ADDR')} {os.environ.get('MASTER_PORT')} {os.getppid()}"
    return Place(rank, ranks, int(os.environ.get("LOCAL_RANK", rank)), launch, reports=rank == 0)
