"""Context parallelism through diffusers, in two and four processes on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import sys
from types import SimpleNamespace

import pytest
import torch.multiprocessing
from diffusers import ContextParallelConfig

from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.context_parallel import share_of
from psa_testing import parallel_ranks
from psa_testing.parallel_ranks import TWO_PROMPTS, UNEVEN
from psa_testing.tiny_pipelines import tiny_transformer

EVEN, ANY = {}, {"ulysses_anything": True}
HAS_ANY = hasattr(ContextParallelConfig, "ulysses_anything")


@pytest.fixture
def on_ranks(tmp_path, monkeypatch):
    """Runs a check of parallel_ranks.py in so many processes, which fork from one that has imported everything."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    multiprocessing.set_forkserver_preload(["parallel_ranks"])

    def run(ranks, check, *arguments):
        started = (ranks, str(tmp_path), check, arguments)
        torch.multiprocessing.start_processes(parallel_ranks.start, started, nprocs=ranks, start_method="forkserver")

    return run


@pytest.mark.parametrize(
    ("ranks", "name", "inputs", "first", "config"),
    [
        (2, "wan", {}, "parallelism", EVEN),
        (4, "wan", {**UNEVEN, **TWO_PROMPTS}, "patch", ANY),
        (2, "wan-two-experts", {}, "patch", EVEN),
        (2, "hunyuan-video", TWO_PROMPTS, "parallelism", EVEN),
        (4, "hunyuan-video", UNEVEN, "patch", ANY),
        (2, "cogvideox-5b", UNEVEN, "patch", ANY),
        (4, "cogvideox-5b", {}, "parallelism", EVEN),
        (2, "cogvideox-2b", {}, "parallelism", EVEN),
        (2, "hunyuan-video-1.5", {}, "patch", EVEN),
        (2, "ltx", TWO_PROMPTS, "parallelism", EVEN),
        (2, "ltx-i2v", {}, "patch", EVEN),
        (2, "ltx-condition", {}, "parallelism", EVEN),
        (2, "mochi", {**UNEVEN, **TWO_PROMPTS}, "patch", ANY),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_several_ranks_equal_one_process(on_ranks, ranks, name, inputs, first, config):
    if config is ANY and not HAS_ANY:
        pytest.skip("this diffusers has no ulysses_anything")
    on_ranks(ranks, parallel_ranks.equals_one_process, name, inputs, first, {"ulysses_degree": ranks, **config})


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_compiled_blocks(on_ranks, name):
    on_ranks(2, parallel_ranks.compiled_blocks, name)


def test_ring_attention_is_dense_and_says_why(on_ranks):
    on_ranks(2, parallel_ranks.ring_is_dense)


def test_what_cannot_be_shared_is_refused(on_ranks):
    on_ranks(2, parallel_ranks.what_cannot_be_shared_is_refused)


@pytest.mark.parametrize(("degree", "frames", "what"), [(8, 3, "heads"), (3, 1, "heads"), (400, 3, "video tokens")])
def test_more_ranks_than_there_is_to_share_are_refused(degree, frames, what):
    """Also with `ulysses_anything`: some ranks would have nothing, and the others wait for them."""
    transformer = tiny_transformer()
    config = SimpleNamespace(ring_degree=1, ulysses_degree=degree, ulysses_anything=True)
    transformer._parallel_config = SimpleNamespace(context_parallel_config=config)
    with pytest.raises(ValueError, match=rf"\d+ {what} cannot be shared by ulysses_degree={degree} ranks"):
        share_of(transformer, Wan, (frames, 8, 8))
