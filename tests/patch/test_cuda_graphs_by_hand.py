"""Forwards captured into CUDA graphs by hand: of stated steps, with lists in tensors that stay, or not at all."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.patch.masks import MaskRecorder
from psa_diffusers.patch.stated_step import held
from psa_diffusers.patch.token_order import permutation_on
from psa_testing.families import NETWORKS, PUBLISHED
from psa_testing.full_size import Noise
from psa_testing.spies import feigned_capture
from psa_testing.tiny_families import CASES, SPARSE, WAN, preset

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TIMESTEPS = [1000.0, 800.0, 600.0, 400.0, 200.0, 20.0]
DENSE, MAKES, READS = 0, 3, 4  # of 6 steps the first three are dense, and with `refresh: 2` step 3 makes lists
KEPT = {"refresh": 2}
SERVED = {"block": {"query": 64, "key": 16}, "thresholds": [0.0, 1.0, 1.0], "float32_on_gpu": "sparse"}
MODELS = {"wan": "WanTransformer3DModel", "hunyuan-video": "HunyuanVideoTransformer3DModel"}
MODELS["cogvideox-5b"] = "CogVideoXTransformer3DModel"


def inputs_of(name, pipe, device="cpu", frames=3, padding=0.5):
    """Random arguments of a transformer's forward, at the frames asked for."""
    network = NETWORKS[MODELS[name]]
    published = next(each for each in PUBLISHED if each.model == MODELS[name] and each.toy)
    shape = list(network.toy_latents(published))
    shape[1 if network.frames_first else 2] = frames
    config = pipe.transformer.config
    shape[2 if network.frames_first else 1] = config.in_channels
    inputs = network.noise_inputs(config, tuple(shape), Noise(torch.float32, device, padding, tiny=True))
    return {**inputs, "return_dict": False}


def forward(pipe, inputs):
    with torch.no_grad():
        return pipe.transformer(**inputs)[0]


def only_real(name, inputs):
    """How many text tokens are real, where the model is given a mask."""
    mask = inputs.get("encoder_attention_mask") if name == "hunyuan-video" else None
    return None if mask is None else mask.sum(1).tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", [DENSE, MAKES])
def test_a_captured_forward_computes_what_it_computes_eagerly(name, step, monkeypatch):
    pipe = CASES[name].make()
    inputs = inputs_of(name, pipe)
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa, psa.run(TIMESTEPS):
        with psa.step(step, text_tokens=only_real(name, inputs)):
            expected = forward(pipe, inputs)
            before = psa.stats()
            assert (before.density_sparse is None) == (step == DENSE)
            with feigned_capture(monkeypatch), pytest.warns(UserWarning, match="not in stats"):
                assert torch.equal(forward(pipe, inputs), expected)
        assert psa.stats() == before


def test_no_masks_are_recorded_of_a_captured_forward(monkeypatch):
    pipe = WAN.make()
    inputs = inputs_of("wan", pipe)
    with apply_psa(pipe, SPARSE) as psa, psa.run(TIMESTEPS), psa.step(MAKES):
        forward(pipe, inputs)
        recorder = MaskRecorder(psa.stats().layers, step=MAKES)
        psa.processor.record_masks(recorder)
        with feigned_capture(monkeypatch), pytest.warns(UserWarning, match="no masks of it are recorded"):
            forward(pipe, inputs)
        assert not recorder.masks()
        forward(pipe, inputs)
        assert len(recorder.masks()) == len(psa.stats().layers)


def test_what_is_captured_needs_a_forward_before(monkeypatch):
    pipe = WAN.make()
    inputs, longer = inputs_of("wan", pipe), inputs_of("wan", pipe, frames=5)
    with apply_psa(pipe, SPARSE, strict=True) as psa, psa.run(TIMESTEPS), psa.step(MAKES):
        forward(pipe, inputs)
        with feigned_capture(monkeypatch), pytest.warns(UserWarning):
            forward(pipe, inputs)
            with pytest.raises(RuntimeError, match="has not attended a call like this yet"):
                forward(pipe, longer)


def test_kept_lists_stay_in_the_same_tensors(monkeypatch):
    """The graph of a later step reads what that of an earlier one wrote, as does one captured for a second time."""
    pipe = WAN.make()
    inputs, others = inputs_of("wan", pipe), inputs_of("wan", pipe)
    with apply_psa(pipe, preset(dense_steps=0.5, **KEPT), strict=True) as psa, psa.run(TIMESTEPS):
        with psa.step(MAKES):
            forward(pipe, inputs)
        entries = dict(psa.processor._runs._run.lists._entries)
        assert entries
        with psa.step(READS):
            expected = forward(pipe, inputs)
        with feigned_capture(monkeypatch), pytest.warns(UserWarning, match="being captured"):
            with psa.step(MAKES):
                forward(pipe, others)
            with psa.step(READS):
                stale = forward(pipe, inputs)
            with psa.step(MAKES):
                forward(pipe, inputs)
            with psa.step(READS):
                assert torch.equal(forward(pipe, inputs), expected)
        assert not torch.equal(stale, expected), "other lists than those of its own inputs"
        for key, entry in psa.processor._runs._run.lists._entries.items():
            assert entry.lists is entries[key].lists
            assert any(each is entry.lists.ids for each in held(pipe.transformer))


def test_figures_of_a_step_stay_when_its_lists_are_made_anew():
    pipe = WAN.make()
    inputs, others = inputs_of("wan", pipe), inputs_of("wan", pipe)
    settings, found = preset(dense_steps=0.5, rule="mass", thresholds=[0.2, 0.4, 0.6], **KEPT), []
    for further in ([], [others]):
        with apply_psa(pipe, settings, strict=True) as psa, psa.run(TIMESTEPS):
            for step, given in ((MAKES, inputs), (READS, inputs), *((MAKES, each) for each in further)):
                with psa.step(step):
                    forward(pipe, given)
            found.append(psa.stats().density)
    assert found[0][READS] == found[1][READS] and found[0][MAKES] != found[1][MAKES]


def test_what_a_graph_reads_lives_as_long_as_the_transformer(monkeypatch):
    pipe = WAN.make()
    inputs = inputs_of("wan", pipe)
    settings = preset(dense_steps=0.5, order="hilbert", **KEPT)
    with apply_psa(pipe, settings) as psa, psa.run(TIMESTEPS), psa.step(MAKES):
        forward(pipe, inputs)
        with feigned_capture(monkeypatch), pytest.warns(UserWarning):
            forward(pipe, inputs)
    permutation_on.cache_clear()
    gc.collect()
    kept = held(pipe.transformer)
    assert {each.dtype for each in kept} == {torch.int64, torch.int16, torch.int32}


def test_padding_has_to_be_stated(monkeypatch):
    name = "hunyuan-video"
    pipe = CASES[name].make()
    inputs = inputs_of(name, pipe)
    with apply_psa(pipe, SPARSE, strict=True) as psa, psa.run(TIMESTEPS):
        with psa.step(MAKES):
            forward(pipe, inputs)
            with (
                feigned_capture(monkeypatch),
                pytest.warns(UserWarning),
                pytest.raises(RuntimeError, match="text_tokens="),
            ):
                forward(pipe, inputs)
        with psa.step(MAKES, text_tokens=[5]), pytest.raises(ValueError, match=r"real text tokens are \[8\]"):
            forward(pipe, inputs)
        with psa.step(MAKES, text_tokens=[8, 8]), pytest.raises(ValueError, match="expected 1 numbers"):
            forward(pipe, inputs)


@pytest.mark.parametrize(
    ("index", "settings", "message"),
    [
        (6, {}, "index=6: .* from 0 to 5"),
        (-1, {}, "index=-1"),
        (True, {}, "index=True"),
        (0, {"branch": -1}, "branch=-1"),
        (0, {"text_tokens": []}, r"text_tokens=\[\]"),
        (0, {"text_tokens": 3}, "text_tokens=3"),
    ],
)
def test_a_step_that_cannot_be(index, settings, message):
    pipe = WAN.make()
    with apply_psa(pipe, SPARSE) as psa:
        with psa.run(TIMESTEPS), pytest.raises(ValueError, match=message), psa.step(index, **settings):
            pass
        with pytest.raises(RuntimeError, match=r"inside `with psa.run\(timesteps\)"), psa.step(0):
            pass


def captured(pipe, psa, step, inputs, text_tokens):
    """A graph of a forward, and its output."""
    graph = torch.cuda.CUDAGraph()
    with psa.step(step, text_tokens=text_tokens), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            pipe.transformer(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            out = pipe.transformer(**inputs)[0]
    return graph, out


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [{}, KEPT], ids=["lists-made", "lists-kept"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_replays_compute_what_is_computed_eagerly(name, kept, compiled):
    """Graphs of dense and sparse steps at two sizes, replayed in turn with other inputs, after calls of other sizes."""
    pipe = CASES[name].make().to("cuda")
    graphs = {}
    with apply_psa(pipe, preset(dense_steps=0.5, order="hilbert", **SERVED, **kept)) as psa, psa.run(TIMESTEPS):
        torch._dynamo.reset()
        if compiled:
            for block in pipe.transformer.transformer_blocks if name != "wan" else pipe.transformer.blocks:
                block.compile()
        for frames in (3, 5):
            inputs = inputs_of(name, pipe, "cuda", frames)
            for step in (DENSE, MAKES, READS):
                graphs[frames, step] = *captured(pipe, psa, step, inputs, only_real(name, inputs)), inputs
        for frames in (7, 9, 11, 13, 15):  # which turn tables of earlier sizes out of their cache
            with psa.step(MAKES):
                forward(pipe, inputs_of(name, pipe, "cuda", frames))
        gc.collect()
        torch.cuda.empty_cache()
        for seed in range(3):
            torch.manual_seed(seed)
            for frames in (5, 3):
                values = inputs_of(name, pipe, "cuda", frames)
                # A run of its own, so that lists are those of these inputs.
                with psa.run(TIMESTEPS) if kept else nullcontext():
                    for step in (DENSE, MAKES, READS):
                        graph, out, static = graphs[frames, step]
                        for key, value in values.items():
                            if torch.is_tensor(value):
                                static[key].copy_(value)
                        graph.replay()
                        replayed = out.clone()
                        with psa.step(step):
                            expected = forward(pipe, values)
                        torch.testing.assert_close(replayed, expected, rtol=0, atol=2e-3)
    torch._dynamo.reset()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", MODELS)
def test_blocks_with_reduced_overhead_compute_what_they_compute_eagerly(name):
    """Blocks compiled one by one: what one leaves for the next must not be overwritten by the graph of another."""
    pipe = CASES[name].make().to("cuda")
    with apply_psa(pipe, preset(dense_steps=0.5, **SERVED)) as psa, psa.run(TIMESTEPS):
        cases = [(step, inputs_of(name, pipe, "cuda", frames)) for frames in (3, 5, 3) for step in (DENSE, MAKES)]
        expected = []
        for step, inputs in cases:
            with psa.step(step):
                expected.append(forward(pipe, inputs).clone())
        torch._dynamo.reset()
        for block in pipe.transformer.transformer_blocks if name != "wan" else pipe.transformer.blocks:
            block.compile(mode="reduce-overhead")
        for _ in range(3):
            for (step, inputs), wanted in zip(cases, expected, strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                with psa.step(step):
                    torch.testing.assert_close(forward(pipe, inputs), wanted, rtol=0, atol=2e-3)
    torch._dynamo.reset()
