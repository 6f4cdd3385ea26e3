"""Context parallelism through diffusers, in two and four processes on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest
import torch.multiprocessing
from diffusers import ContextParallelConfig

from psa_testing import parallel_ranks
from psa_testing.families import PARALLEL

HAS_ANY = hasattr(ContextParallelConfig, "ulysses_anything")


@pytest.fixture
def on_ranks(tmp_path, monkeypatch):
    """Runs a check of parallel_ranks.py in so many processes, which fork from one that has imported everything."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    multiprocessing.set_forkserver_preload(["psa_testing.parallel_ranks"])

    def run(ranks, check, *arguments):
        started = (ranks, str(tmp_path), check, arguments)
        torch.multiprocessing.start_processes(parallel_ranks.start, started, nprocs=ranks, start_method="forkserver")

    return run


RUNS = [(name, ranks) for name, parallel in PARALLEL.items() for ranks in parallel.runs]


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[f"{name}-{run.count}-{run.first}" for name, run in RUNS])
def test_several_ranks_equal_one_process(on_ranks, name, run):
    if run.any_length and not HAS_ANY:
        pytest.skip("this diffusers has no ulysses_anything")
    config = {"ulysses_degree": run.count, **({"ulysses_anything": True} if run.any_length else {})}
    on_ranks(run.count, parallel_ranks.equals_one_process, name, run.inputs, run.first, config)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_compiled_blocks(on_ranks, name):
    on_ranks(2, parallel_ranks.compiled_blocks, name)


def test_ring_attention_is_dense_and_says_why(on_ranks):
    on_ranks(2, parallel_ranks.ring_is_dense)


def test_what_cannot_be_shared_is_refused(on_ranks):
    on_ranks(2, parallel_ranks.what_cannot_be_shared_is_refused)
