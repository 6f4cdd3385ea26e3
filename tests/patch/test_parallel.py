"""Context parallelism through diffusers, in two and four processes on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ContextParallelConfig

from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.parallel.plan import share_of
from psa_diffusers.report.video import read_video
from psa_testing import parallel_ranks
from psa_testing.families import PARALLEL
from psa_testing.tiny_pipelines import tiny_transformer

HAS_ANY = hasattr(ContextParallelConfig, "ulysses_anything")


RUNS = [(name, ranks) for name, parallel in PARALLEL.items() for ranks in parallel.runs]


@pytest.mark.parametrize(("name", "run"), RUNS, ids=[f"{name}-{run.count}-{run.first}" for name, run in RUNS])
def test_several_ranks_equal_one_process(on_ranks, name, run):
    if run.any_length and not HAS_ANY:
        pytest.skip("this diffusers has no ulysses_anything")
    on_ranks(run.count, parallel_ranks.equals_one_process, name, run.inputs, run.first, run.config)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_a_spoiled_layer_is_that_of_one_process(on_ranks, name):
    on_ranks(2, parallel_ranks.a_spoiled_layer, name)


@pytest.mark.parametrize("dense_too", [False, True])
def test_ranks_act_together_on_what_one_of_them_finds(on_ranks, dense_too):
    on_ranks(2, parallel_ranks.spoiled_heads, dense_too)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_compiled_blocks(on_ranks, name):
    on_ranks(2, parallel_ranks.compiled_blocks, name)


@pytest.mark.skipif(not HAS_ANY, reason="this diffusers has no ulysses_anything")
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="this PyTorch cannot leave out compiled forwards")
def test_forwards_that_were_compiled_before_they_are_shared(on_ranks):
    """The refiner of the text, which every rank has whole, exchanges nothing."""
    uneven = next(run for run in PARALLEL["minimax-h3"].runs if run.any_length)
    on_ranks(2, parallel_ranks.forwards_compiled_before, "minimax-h3", uneven.inputs)


def test_parts_travel_while_the_next_is_projected(on_ranks):
    on_ranks(2, parallel_ranks.parts_travel_early)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_dense_steps_by_the_operator(on_ranks, name):
    on_ranks(2, parallel_ranks.dense_by_the_operator, name)


def test_the_example_for_two_gpus(on_ranks, saved, tmp_path):
    output, example = tmp_path / "made.mp4", Path(__file__).parents[2] / "examples" / "two_gpus.py"
    settings = {"model": str(saved / "wan"), "preset": str(saved / "small.yaml"), "device": "cpu"}
    settings |= {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "output": str(output)}
    on_ranks(2, parallel_ranks.an_example, str(example), settings)
    assert read_video(output).frames.shape == (5, 64, 64, 3)


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
