"""Forwards that are captured once a kind and replayed: they compute, note and check what the model's own would."""

from __future__ import annotations

import gc
import itertools
import math
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch.utils._pytree import tree_leaves

from psa_diffusers import apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_diffusers.patch.full_attention import FullAttention
from psa_diffusers.patch.masks import MaskRecorder
from psa_diffusers.patch.modules import find_transformers
from psa_diffusers.patch.replays import Recording
from psa_diffusers.patch.stated_step import WarmCalls
from psa_diffusers.runs import forward_graphs
from psa_diffusers.runs.forward_graphs import replay_forward, replay_forwards
from psa_testing.families import ONE_EACH
from psa_testing.spies import feigned_capture, spoil_sparse
from psa_testing.tiny_families import CASES, WAN, preset
from psa_testing.tiny_runs import STEPS, carry_out, edit_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FOUR = {"num_inference_steps": 4}
CHOSEN = preset(dense_steps=0.5)


# Models whose forwards read values, such as how long the text is, or bring numbers from the host.
READ_VALUES = {"consisid", "easyanimate", "framepack", "hunyuan-video", "hunyuan-video-1.5", "mochi", "motif-video"}
# Those of which this package reads how long the text is.
PADDED = {"hunyuan-video", "hunyuan-video-1.5", "mochi", "motif-video"}


class Feigned:
    """Feigns CUDA graphs on a CPU: a replay computes anew, and writes to where the captured forward left its results.

    Every replay poisons what all others have left, because graphs share their memory.
    """

    def __init__(self, monkeypatch) -> None:
        self.captured = self.replayed = self.failed = 0
        self._monkeypatch, self._left = monkeypatch, []

    def __call__(self, compute, device):
        self.failed += 1
        found = self._compute(compute)
        self.failed, self.captured = self.failed - 1, self.captured + 1
        results = tensors_of(found)
        self._left += results
        self._poison()

        def replay():
            self.replayed += 1
            with self._monkeypatch.context() as patch:  # a replay runs no Python, so nobody asks
                patch.setattr(WarmCalls, "check", lambda *call: None)
                new = tensors_of(self._compute(compute))
            self._poison()
            for kept, made in zip(results, new, strict=True):
                kept.copy_(made)

        return found, replay

    def _poison(self):
        for each in self._left:
            each.fill_(math.nan if each.is_floating_point() else -9999)

    def _compute(self, compute):
        with feigned_capture(self._monkeypatch):
            return compute()

    def replaying(self, pipe):
        for transformer in find_transformers(pipe).values():
            replay_forward(transformer, self)
        return pipe


def tensors_of(results):
    output, recording = results
    lists = [(each.ids, each.counts) for _, each in recording.lists]
    return [each for each in tree_leaves((output, recording.figures, lists)) if torch.is_tensor(each)]


@pytest.fixture
def feigned(monkeypatch):
    feigned = Feigned(monkeypatch)
    yield feigned
    assert not feigned.failed


def videos(case, pipe, chosen=CHOSEN):
    """A sparse and a dense video, and what the sparse run attended."""
    with apply_psa(pipe, chosen) as psa:
        sparse = case.run(pipe, **FOUR)
    return sparse, case.run(pipe, **FOUR), psa.stats()


@pytest.mark.parametrize("name", ONE_EACH)
def test_videos_and_figures_are_those_without_graphs(name, feigned):
    case = CASES[name]
    sparse, dense, stats = videos(case, case.make())
    found = videos(case, feigned.replaying(case.make()))
    assert torch.equal(found[0], sparse) and torch.equal(found[1], dense) and found[2] == stats
    assert stats.density_sparse is not None and feigned.replayed > 0
    assert (feigned.failed > 0) == (name in PADDED)
    feigned.failed = 0


def test_another_video_needs_no_other_graphs(feigned):
    pipe = feigned.replaying(WAN.make())
    videos(WAN, pipe)
    captured, replayed = feigned.captured, feigned.replayed
    assert captured == 3, "dense without the patch; dense and sparse with it"
    seed = {"generator": torch.Generator().manual_seed(5)}
    with apply_psa(pipe, preset(dense_steps=0.5)) as psa:
        again = WAN.run(pipe, **FOUR, **seed)
    assert feigned.captured == captured and feigned.replayed > replayed
    seed = {"generator": torch.Generator().manual_seed(5)}
    plain = WAN.make()
    with apply_psa(plain, CHOSEN) as other:
        assert torch.equal(again, WAN.run(plain, **FOUR, **seed))
    assert psa.stats().density == other.stats().density


def test_other_presets_and_sizes_have_graphs_of_their_own(feigned):
    pipe, plain = feigned.replaying(WAN.make()), WAN.make()
    for changes in ({}, {"thresholds": [0.5, 0.5, 0.5]}, {"order": "hilbert"}):
        for frames in (5, 9):
            found = []
            for each in (pipe, plain):
                with apply_psa(each, preset(dense_steps=0.5, **changes)):
                    found.append(WAN.run(each, **FOUR, num_frames=frames))
            assert torch.equal(*found)
    assert feigned.captured == 8, "at each of two sizes dense, and sparse three times"


@pytest.mark.parametrize("key", ["refresh", "share_guidance", "correction"])
def test_what_leaves_something_for_later_forwards_is_not_captured(key, feigned):
    chosen = preset(dense_steps=0.5, **{key: 2 if key == "refresh" else True})
    sparse, _, stats = videos(WAN, WAN.make(), chosen)
    found, _, found_stats = videos(WAN, feigned.replaying(WAN.make()), chosen)
    assert torch.equal(found, sparse) and found_stats == stats
    assert feigned.captured == 2, "dense ones, without the patch and with it"


def test_dense_steps_by_the_operator_are_not_captured(feigned, monkeypatch):
    monkeypatch.setattr(FullAttention, "is_on", lambda self, device: True)
    monkeypatch.setattr(FullAttention, "serves", lambda self, layer, call, qkv: False)
    pipe = feigned.replaying(WAN.make())
    with apply_psa(pipe, preset(dense_steps=0.5, dense_attention="psa")):
        WAN.run(pipe, **FOUR)
    assert feigned.captured == 1, "the sparse one"


def test_figures_are_those_of_each_step(feigned):
    chosen = preset(dense_steps=0.5, rule="mass", thresholds=[0.2, 0.4, 0.6])
    _, _, stats = videos(WAN, WAN.make(), chosen)
    _, _, found = videos(WAN, feigned.replaying(WAN.make()), chosen)
    assert found == stats and stats.density[2] != stats.density[3]


def test_masks_are_recorded(feigned, monkeypatch):
    """Of the chosen layer alone, also in runs after others of which nobody recorded any."""
    found, kept = [], []
    keep = Recording.keep
    monkeypatch.setattr(Recording, "keep", lambda self, notes: kept.append(len(self.lists)) or keep(self, notes))
    for pipe in (WAN.make(), feigned.replaying(WAN.make())):
        videos(WAN, pipe)
        with apply_psa(pipe, CHOSEN) as psa:
            recorder = MaskRecorder(psa.stats().layers[:1])
            psa.processor.record_masks(recorder)
            WAN.run(pipe, **FOUR)
        found.append([(mask.layer, mask.step, mask.levels.tolist()) for mask in recorder.masks()])
    assert found[0] == found[1] and len(found[0]) == 1
    assert feigned.replayed > 0 and set(kept) == {0, 1}


def test_what_is_not_finite_is_found_after_the_run_and_computed_again_in_the_next(feigned, monkeypatch):
    pipe = feigned.replaying(WAN.make())
    spoil_sparse(monkeypatch, float("nan"), layers=("blocks.1",), steps=(3,))
    with apply_psa(pipe, CHOSEN) as psa:
        assert WAN.run(pipe, **FOUR).isnan().any() and feigned.replayed > 0
        assert WAN.run(pipe, num_inference_steps=2).isfinite().all(), "a run after it, before anybody asks"
        assert not psa.processor.replays_were_finite()
        replayed = feigned.replayed
        with pytest.warns(PSAFallbackWarning, match=r"blocks.1 at step 4 of 4"):
            assert WAN.run(pipe, **FOUR).isfinite().all()
        assert feigned.replayed == replayed and psa.processor.replays_were_finite()
    assert psa.stats().not_finite == {"blocks.1": [3]}


def test_a_run_whose_first_forward_of_a_kind_is_not_finite_needs_no_other(feigned, monkeypatch):
    pipe = feigned.replaying(WAN.make())
    spoil_sparse(monkeypatch, float("nan"), layers=("blocks.1",), steps=(2,))
    with apply_psa(pipe, CHOSEN) as psa, pytest.warns(PSAFallbackWarning, match=r"blocks.1 at step 3 of 4"):
        assert WAN.run(pipe, **FOUR).isfinite().all()
        assert psa.processor.replays_were_finite()


def test_a_video_whose_replays_were_not_finite_is_made_again(ask, feigned, monkeypatch, capsys):
    edit_pipeline(monkeypatch, feigned.replaying)
    spoil_sparse(monkeypatch, layers=("blocks.1",), steps=(STEPS - 1,))
    (told,) = carry_out(ask("a cat", compare=True))["prompts"]
    said = f"small: blocks.1: sparse attention was not finite at step {STEPS}; dense there"
    assert said in told["warnings"] and math.isfinite(told["psnr"]) and feigned.replayed > 0
    assert "small: a CUDA graph gave values that are not finite; the video is made again" in capsys.readouterr().err


def test_what_cannot_be_captured_is_computed_and_told_once(capsys):
    def cannot(compute, device):
        compute()
        raise RuntimeError("operation not permitted when stream is capturing\nat length")

    pipe = WAN.make()
    sparse, dense, stats = videos(WAN, pipe)
    replay_forward(pipe.transformer, cannot)
    found = videos(WAN, pipe)
    assert torch.equal(found[0], sparse) and torch.equal(found[1], dense) and found[2] == stats
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning")] == [
        "warning: WanTransformer3DModel: a forward cannot be captured into a CUDA graph, and is launched one operation "
        "at a time: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_a_cache_of_blocks_is_left_alone(feigned, capsys):
    def cached():
        pipe = WAN.make()
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        return pipe

    sparse, dense, _ = videos(WAN, cached())
    found = videos(WAN, feigned.replaying(cached()))
    assert torch.equal(found[0], sparse) and torch.equal(found[1], dense) and not feigned.captured
    assert "a cache decides" in capsys.readouterr().err


def test_arguments_that_cannot_be_compared_are_left_alone(feigned):
    module = torch.nn.Linear(2, 2)
    own = module.forward
    module.forward = lambda x, options: own(x) * len(options)
    replay_forward(module, feigned)
    with torch.no_grad():
        for size in (2, 3):
            x = torch.randn(4, 2)
            assert torch.equal(module(x, {*range(size)}), own(x) * size)
    assert not feigned.captured


def test_kinds_of_forwards_are_bounded(feigned, capsys, monkeypatch):
    monkeypatch.setattr(forward_graphs, "MOST", 2)
    sparse, dense, stats = videos(WAN, WAN.make())
    found = videos(WAN, feigned.replaying(WAN.make()))
    assert torch.equal(found[0], sparse) and torch.equal(found[1], dense) and found[2] == stats
    assert feigned.captured == 2 and "more than 2 kinds" in capsys.readouterr().err


def test_a_capture_that_fails_leaves_nothing_for_the_next_one(monkeypatch):
    """Graphs share memory and a stream, but for those after a failure; one with nothing in it is a failure."""
    entered, places = [], []

    @contextmanager
    def within(value):
        entered.append(value)
        yield
        entered.append(("left", value))

    @contextmanager
    def graph(graph, *, pool, stream, capture_error_mode):
        places.append((pool, stream))
        yield
        if graph.empty:
            warnings.warn("The CUDA Graph is empty. This usually means ...", UserWarning, stacklevel=1)

    counted = itertools.count()
    stubs = {"device": within, "stream": within, "graph": graph, "current_stream": lambda: "current"}
    stubs |= {"graph_pool_handle": lambda: next(counted), "Stream": lambda: next(counted)}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    empty = iter([False, False, True, False, False])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(empty=next(empty), replay="replay"))
    capture, device = forward_graphs._OnCuda(), torch.device("cuda:1")
    for _ in range(2):
        assert capture(lambda: "results", device) == ("results", "replay")
    with pytest.raises(RuntimeError, match="nothing was launched on cuda:1"):
        capture(lambda: "results", device)
    assert capture(lambda: "results", device) == ("results", "replay")
    with pytest.raises(ZeroDivisionError):
        capture(lambda: 1 / 0, device)
    assert places == [(0, 1)] * 3 + [(2, 3)] * 2
    assert entered[:4] == [device, "current", ("left", "current"), ("left", device)]


def on_gpu(name, place):
    """Videos of two seeds without graphs and with them, on a device; memory is used in between."""
    case = CASES[name]
    block = {"block": {"query": 64, "key": 16}, "thresholds": [0.0, 1.0, 1.0], "float32_on_gpu": "sparse"}
    chosen = preset(dense_steps=0.5, **block)
    plain, pipe = case.make().to(place), case.make().to(place)
    replay_forwards(pipe)
    for seed in (0, 1, 0):
        found = []
        for each in (plain, pipe):
            given = {**FOUR, "generator": torch.Generator().manual_seed(seed)}
            with apply_psa(each, chosen) as psa:
                sparse = case.run(each, **given)
            given["generator"].manual_seed(seed)
            found.append((sparse, case.run(each, **given), psa.stats()))
            gc.collect()
            torch.cuda.empty_cache()
            torch.full((2**26,), math.nan, device=place)
        (sparse, dense, stats), (replayed, replayed_dense, replayed_stats) = found
        torch.testing.assert_close(replayed, sparse, rtol=0, atol=2e-3)
        torch.testing.assert_close(replayed_dense, dense, rtol=0, atol=2e-3)
        assert replayed_stats.density == stats.density
        assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("name", [name for name in ONE_EACH if name not in ("kandinsky5", "minimax-h3")])
def test_replays_on_a_gpu(name, capsys):
    """Two toys have their text on the CPU."""
    on_gpu(name, "cuda")
    assert ("cannot be captured" in capsys.readouterr().err) == (name in READ_VALUES)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_replays_on_a_gpu_that_is_not_the_current_one(capsys):
    on_gpu("wan", "cuda:1")
    assert torch.cuda.current_device() == 0 and "cannot be captured" not in capsys.readouterr().err
