"""A processor that `set_attn_processor` has set begins with the next forward; one that is never set does nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from psa_diffusers import PSAProcessor, apply_psa
from psa_testing.tiny_families import EVERYTHING, preset
from psa_testing.tiny_pipelines import tiny_wan
from psa_testing.wan_latents import run

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def hooks(pipe):
    return len(pipe.transformer._forward_pre_hooks) + len(pipe.transformer._forward_hooks)


@pytest.mark.parametrize("restored", [True, False], ids=["restored", "replaced"])
def test_a_processor_a_request_makes_no_graphs_of_its_own(restored):
    pipe = tiny_wan(num_layers=2)
    with apply_psa(pipe, preset(), strict=True):
        expected = run(pipe)
    counter = CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    graphs = []
    for _ in range(3):
        processor = PSAProcessor(pipe, preset(), strict=True)
        pipe.transformer.set_attn_processor(processor)
        torch.testing.assert_close(run(pipe), expected, rtol=0, atol=2e-5)
        assert processor.stats().density_sparse < 0.5
        if restored:
            processor.restore()
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_processors_that_wait_for_each_other_take_turns():
    pipe = tiny_wan(num_layers=2)
    both = [PSAProcessor(pipe, chosen, strict=True) for chosen in (preset(), EVERYTHING)]
    for place in (1, 0, 1, 0):
        pipe.transformer.set_attn_processor(both[place])
        run(pipe)
        assert (both[place].stats().density_sparse == 1) == (place == 1)
    for processor in both:
        processor.restore()
    assert not hooks(pipe)


def test_one_that_is_never_set_is_forgotten():
    pipe = tiny_wan(num_layers=2)
    stock = run(pipe)
    made = [PSAProcessor(pipe, preset()) for _ in range(3)]
    assert torch.equal(run(pipe), stock) and made[0].stats().steps == 0
    seen = [weakref.ref(each) for each in made]
    del made
    gc.collect()
    assert [each() for each in seen] == [None] * 3 and not hooks(pipe)


def test_copies_wait_for_nothing():
    pipe = tiny_wan(num_layers=2)
    stock = run(pipe)
    processor = PSAProcessor(pipe, preset(), strict=True)
    copies = copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))
    pipe.transformer.set_attn_processor(processor)
    own = pipe.transformer
    for pipe.transformer in copies:
        assert torch.equal(run(pipe), stock) and processor.stats().steps == 0
    pipe.transformer = own
    run(pipe)
    assert processor.stats().density_sparse < 0.5


def test_a_compiled_transformer_stays_one_graph():
    pipe = tiny_wan(num_layers=1)
    pipe.transformer.compile(backend="eager", fullgraph=True)
    inputs = torch.randn(1, 16, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 16, 32)
    with torch.no_grad():
        stock = pipe.transformer(*inputs, return_dict=False)[0]
        processor = PSAProcessor(pipe, preset())
        assert torch.equal(pipe.transformer(*inputs, return_dict=False)[0], stock)
    assert processor.stats().steps == 0
