"""Runs that go on at the same time, of pipelines that share a transformer: each is as it would be alone."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from diffusers import WanPipeline

from psa_diffusers import apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_diffusers.patch.sites import LayerSite
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import run as run_small
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error::UserWarning:psa_diffusers")]

# What belongs to one run alone: chosen blocks, lists for later steps and branches, what is left out, rules for steps.
PRESETS = {
    "sparse": preset(),
    "kept-lists": preset(refresh=2, share_guidance=True),
    "corrected": preset(correction=True, dense_steps=0.25),
    "rules-for-steps": preset(
        dense_steps=0.0, steps=[{"match": "50%-", "order": "raster", "levels": [1], "thresholds": [0.5]}]
    ),
}


def run(pipe, seed=0, **inputs):
    return run_small(pipe, seed=seed, **{"output_type": "latent", "height": 64, "width": 64, **inputs})


def relative(pipe):
    """Another pipeline with the same transformer and a scheduler of its own."""
    found = WanPipeline(**pipe.components)
    found.scheduler = copy.deepcopy(pipe.scheduler)
    return found


def taking_turns(module, parties):
    """Let the calls of a module in several threads wait for each other, as long as all of them still make some."""
    barrier = threading.Barrier(parties)

    def wait(*_):
        with suppress(threading.BrokenBarrierError):  # another thread is done
            barrier.wait(20)

    return barrier, module.register_forward_pre_hook(wait)


@pytest.mark.parametrize("chosen", PRESETS.values(), ids=PRESETS)
def test_in_threads(chosen):
    requests = [{"seed": 1, "num_inference_steps": 6}, {"seed": 2, "num_inference_steps": 4, "height": 96}]
    alone = []
    for request in requests:
        pipe = tiny_wan(num_layers=2)
        apply_psa(pipe, chosen, strict=True)
        alone.append(run(pipe, **request))
    pipe = tiny_wan(num_layers=2)
    apply_psa(pipe, chosen, strict=True)
    barrier, hook = taking_turns(pipe.transformer.blocks[1], len(requests))

    def serve(request, with_pipe):
        try:
            return run(with_pipe, **request)
        finally:
            barrier.abort()

    with ThreadPoolExecutor(len(requests)) as threads:
        found = list(threads.map(serve, requests, [pipe, relative(pipe)]))
    hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


@pytest.mark.parametrize("chosen", PRESETS.values(), ids=PRESETS)
def test_one_within_a_step_of_another(chosen):
    pipe = tiny_wan(num_layers=2)
    psa = apply_psa(pipe, chosen, strict=True)
    alone = run(pipe, num_inference_steps=6)
    statistics = psa.stats()
    preview = relative(pipe)

    def show(_pipe, step, _timestep, inputs):
        if step in (1, 3):
            run(preview, seed=5, num_inference_steps=2)
        return inputs

    assert torch.equal(run(pipe, num_inference_steps=6, callback_on_step_end=show), alone)
    assert psa.stats() == statistics


def test_a_run_keeps_nothing_once_its_timesteps_are_gone():
    pipe = tiny_wan(num_layers=2)
    psa = apply_psa(pipe, preset(correction=True, refresh=2, dense_steps=0.25), strict=True)

    def interrupt(pipe, step, _timestep, inputs):
        pipe._interrupt = step == 2
        return inputs

    other = relative(pipe)
    run(other, num_inference_steps=8, callback_on_step_end=interrupt)
    runs = psa.processor._runs
    kept = weakref.ref(runs._run.corrections)
    assert kept()._kept and runs._run.lists._entries
    run(pipe, num_inference_steps=2)
    assert kept()  # it may go on
    del other
    gc.collect()
    assert kept() is None


def stream(pipe, psa, timesteps, seed):
    """A denoising loop by hand that gives its latents after each step."""
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(1, 16, 1, 8, 8, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with psa.run(timesteps):
        for t in timesteps:
            with torch.no_grad():
                x = x - 0.01 * pipe.transformer(x, t.expand(1), text, return_dict=False)[0]
            yield x


def last(steps):
    *_, found = steps
    return found


def test_generators_that_take_turns():
    pipe = tiny_wan(num_layers=2)
    psa = apply_psa(pipe, preset(correction=True, refresh=2, dense_steps=0.25), strict=True)
    times = torch.linspace(1000, 100, 8)
    alone = [last(stream(pipe, psa, times, 1)), last(stream(pipe, psa, times[:6], 2))]
    usual = run(pipe)
    first, second = stream(pipe, psa, times, 1), stream(pipe, psa, times[:6], 2)
    for _ in range(3):
        next(first), next(second)
    assert torch.equal(last(first), alone[0]) and torch.equal(last(second), alone[1])
    assert torch.equal(run(pipe), usual) and psa.stats().steps == 4


def test_a_pipeline_beside_a_generator_that_nobody_goes_on_with():
    pipe = tiny_wan(num_layers=2)
    psa = apply_psa(pipe, preset(), strict=True)
    usual = run(pipe)
    abandoned = stream(pipe, psa, torch.linspace(1000, 100, 8), 1)
    next(abandoned)
    assert torch.equal(run(pipe), usual) and psa.stats().steps == 4
    abandoned.close()


def test_timesteps_that_another_function_tells_and_another_thread():
    pipe = tiny_wan(num_layers=2)
    psa = apply_psa(pipe, preset(), strict=True)
    times = torch.linspace(1000, 100, 4)
    x, text = torch.randn(1, 16, 1, 8, 8), torch.randn(1, 16, 32)

    def loop():
        with torch.no_grad():
            return [pipe.transformer(x, t.expand(1), text, return_dict=False)[0] for t in times]

    def tell():
        telling = psa.run(times)
        telling.__enter__()
        return telling

    with psa.run(times):
        alone = loop()
    telling = tell()
    with ThreadPoolExecutor(1) as thread:
        elsewhere = thread.submit(loop).result()
    here = loop()
    telling.__exit__(None, None, None)
    assert torch.equal(torch.stack(here), torch.stack(alone))
    assert torch.equal(torch.stack(elsewhere), torch.stack(alone))


def test_a_graph_that_was_chosen_for_another_threads_step():
    pipe = tiny_wan(num_layers=2)
    psa = apply_psa(pipe, preset(dense_steps=0.5))
    for block in pipe.transformer.blocks:
        block.compile(backend="eager", fullgraph=True)
    (patch,) = psa.processor._patches

    def choose_as_in_the_dense_phase(*_):
        for site in patch.sites.values():
            if isinstance(site, LayerSite):
                site.in_graph = False

    pipe.transformer.register_forward_pre_hook(choose_as_in_the_dense_phase)
    with pytest.warns(PSAFallbackWarning, match="chosen for a forward of another thread") as told:
        run(pipe)
    assert len([each for each in told if each.category is PSAFallbackWarning]) == 1
    statistics = psa.stats()
    assert statistics.density_sparse is None and sum(statistics.fallbacks.values()) == 2 * 2 * 2
