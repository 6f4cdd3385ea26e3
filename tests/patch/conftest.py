"""What tests of several processes need."""

from __future__ import annotations

import pytest
import torch.multiprocessing

from psa_testing import parallel_ranks


@pytest.fixture
def on_ranks(tmp_path, forks):
    """Runs a check of parallel_ranks.py in so many processes, which fork from one that has imported everything."""

    def run(ranks, check, *arguments):
        started = (ranks, str(tmp_path), check, arguments)
        torch.multiprocessing.start_processes(parallel_ranks.start, started, nprocs=ranks, start_method="forkserver")

    return run
