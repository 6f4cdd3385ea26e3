"""Tokens in the order of the blocks for a whole forward: the results of layers that reorder them for themselves."""

from __future__ import annotations

import gc
import types
import weakref

import diffusers
import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.patch import attend as token_attention
from psa_diffusers.patch.reordering import Reordering
from psa_testing.group_offload import offload_groups
from psa_testing.tiny_families import CASES, EVERYTHING, SPARSE, assert_equal_to_rounding, preset
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import tiny_wan, tiny_wan_expanded, tiny_wan_i2v

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = Case(lambda: tiny_wan(num_layers=3), {**GUIDED, **SMALL_TEXT})
HALF = preset(dense_steps=0.5)


@pytest.fixture
def seen(monkeypatch):
    """Of each sparse call, whether tokens came in the order of their blocks."""
    calls = []
    attend = token_attention.attend

    def spy(*args, permutation, **kwargs):
        calls.append(permutation is None)
        return attend(*args, permutation=permutation, **kwargs)

    monkeypatch.setattr(token_attention, "attend", spy)
    return calls


def run_layer_by_layer(case, pipe, preset, **inputs):
    """The result where each layer reorders tokens for itself."""
    with apply_psa(pipe, preset, strict=True) as psa:
        psa.processor.reorders_tokens = False
        return case.run(pipe, **inputs), psa.stats()


def check(case, pipe, preset, seen, once=True, **inputs):
    expected, stats = run_layer_by_layer(case, pipe, preset, **inputs)
    assert seen and not any(seen)
    seen.clear()
    with apply_psa(pipe, preset, strict=True) as psa:
        assert_equal_to_rounding(case.run(pipe, **inputs), expected)
        assert psa.stats() == stats
    assert seen and set(seen) == {once}


EXPANDED = Case(tiny_wan_expanded, {**GUIDED, **SMALL_TEXT})
IMAGE = Case(tiny_wan_i2v, {**GUIDED, **SMALL_TEXT, "image": CASES["cogvideox-i2v"].inputs["image"]})
REORDERED = {
    "wan": WAN,
    "image to video": IMAGE,
    "a timestep a token": EXPANDED,
    "hunyuan-video": CASES["hunyuan-video"],
    "hunyuan-video-distilled": CASES["hunyuan-video-distilled"],
    **{
        name: CASES[name]
        for name in ("hunyuan-video-i2v-concat", "cogvideox-2b", "cogvideox-5b", "cogvideox-1.5", "cogvideox-i2v")
    },
}


@pytest.mark.parametrize("order", ["hilbert", "tiles"])
@pytest.mark.parametrize("name", REORDERED)
def test_the_result_is_that_of_each_layer_for_itself(name, order, seen):
    case = REORDERED[name]
    check(case, case.make(), preset(dense_steps=0.3, order=order, tile=(2, 4, 4)), seen)


@pytest.mark.parametrize("inputs", [{"height": 96, "width": 160}, {"num_frames": 5, "height": 112, "width": 80}])
def test_other_sizes(inputs, seen):
    check(WAN, WAN.make(), SPARSE, seen, **inputs)


def test_timesteps_go_with_their_tokens(seen):
    """As those of a first frame that is given, which is not noisy."""
    pipe = EXPANDED.make()

    def first_tokens_are_clean(_, args, kwargs):
        timestep = kwargs["timestep"].clone()
        timestep[:, : timestep.shape[1] // 3] = 0
        return args, {**kwargs, "timestep": timestep}

    pipe.transformer.register_forward_pre_hook(first_tokens_are_clean, with_kwargs=True)
    check(EXPANDED, pipe, SPARSE, seen)


def test_keeping_everything_is_dense_attention(seen):
    for case in (WAN, CASES["hunyuan-video"], CASES["cogvideox-5b"]):
        pipe = case.make()
        stock = case.run(pipe)
        with apply_psa(pipe, EVERYTHING, strict=True):
            assert_equal_to_rounding(case.run(pipe), stock)
    assert all(seen)


def test_dense_layers_and_dense_steps(seen):
    """Dense layers see the order of the sparse ones; dense steps have the stock model's bits."""
    changes = {"dense_steps": 0.5, "layers": [{"match": "0", "dense": True}]}
    check(WAN, WAN.make(), preset(**changes), seen)
    pipe = WAN.make()
    stock, steps = [], []
    note = {"callback_on_step_end": lambda *args: steps.append(args[3]["latents"].clone()) or {}}
    WAN.run(pipe, **note)
    stock, steps = steps, []
    note = {"callback_on_step_end": lambda *args: steps.append(args[3]["latents"].clone()) or {}}
    with apply_psa(pipe, preset(**changes), strict=True):
        WAN.run(pipe, **note)
    assert [torch.equal(a, b) for a, b in zip(stock, steps, strict=True)] == [True, True, False, False]


def test_kept_lists_and_two_experts(seen):
    check(WAN, WAN.make(), preset(dense_steps=0.0, refresh=2, share_guidance=True), seen)
    experts = Case(lambda: tiny_wan(two_stage=True, num_layers=2), {**GUIDED, **SMALL_TEXT})
    seen.clear()
    check(experts, experts.make(), SPARSE, seen)


def first_block_cache(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.12))


def another_forward(pipe):
    """As caches do that are not diffusers'."""
    model = pipe.transformer
    stock = type(model).forward

    def forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def hook_on_a_block(pipe):
    """As of what adds something to the tokens by their place."""
    there = torch.linspace(-1, 1, 192)[:, None]
    pipe.transformer.blocks[1].register_forward_hook(lambda block, args, tokens: tokens + 0.1 * there)


def compiled_whole(pipe):
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager")


def compiled_embedding(pipe):
    torch._dynamo.reset()
    pipe.transformer.patch_embedding.compile(backend="eager")


@pytest.mark.parametrize(
    "change", [first_block_cache, another_forward, hook_on_a_block, compiled_whole, compiled_embedding]
)
def test_what_could_notice_is_left_alone(change, seen):
    pipe = WAN.make()
    change(pipe)
    check(WAN, pipe, HALF, seen, once=False)


@pytest.mark.parametrize("name", ["wan-vace", "wan-animate", "hunyuan-video-i2v", "framepack", "ltx"])
def test_families_that_reorder_in_each_layer(name, seen):
    case = CASES[name]
    check(case, case.make(), SPARSE, seen, once=False)


def test_layers_of_different_orders(seen):
    mixed = preset(dense_steps=0.0, layers=[{"match": "1", "order": "tiles"}])
    expected, _ = run_layer_by_layer(WAN, WAN.make(), mixed)
    seen.clear()
    with apply_psa(pipe := WAN.make(), mixed, strict=True):
        assert_equal_to_rounding(WAN.run(pipe), expected)
    assert not any(seen)


def test_compiled_blocks_and_offload(seen):
    for change in (
        lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
        lambda pipe: offload_groups(pipe.transformer),
    ):
        torch._dynamo.reset()
        pipe = WAN.make()
        change(pipe)
        seen.clear()
        check(WAN, pipe, HALF, seen)


def test_accelerate_offload(seen):
    accelerate = pytest.importorskip("accelerate")
    pipe = WAN.make()
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    check(WAN, pipe, HALF, seen)


def test_a_module_that_is_replaced_between_two_runs(seen):
    """As LoRA replaces those that it changes."""

    class Wrapper(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 0.5 * x[..., : self.base.out_features]

    expected = []
    for reorders in (False, True):
        pipe = WAN.make()
        with apply_psa(pipe, SPARSE, strict=True) as psa:
            psa.processor.reorders_tokens = reorders
            WAN.run(pipe)
            pipe.transformer.proj_out = Wrapper(pipe.transformer.proj_out)
            expected.append(WAN.run(pipe))
    assert_equal_to_rounding(*expected)
    assert any(seen)


def test_a_forward_that_fails_leaves_nothing_behind(seen, monkeypatch):
    pipe = WAN.make()
    stock = WAN.run(pipe)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with apply_psa(pipe, HALF, strict=True):
        expected = WAN.run(pipe)
        with monkeypatch.context() as failing, pytest.raises(KeyboardInterrupt):
            failing.setattr(token_attention, "attend", fail)
            WAN.run(pipe)
        assert torch.equal(WAN.run(pipe), expected) and all(seen)
    assert torch.equal(WAN.run(pipe), stock)
    assert not pipe.transformer.proj_out._forward_hooks and not pipe.transformer.rope._forward_hooks


@pytest.mark.parametrize(("case", "layer"), [(WAN, "blocks.1"), (CASES["cogvideox-5b"], "transformer_blocks.1")])
def test_a_forward_that_is_computed_again(case, layer, monkeypatch, seen):
    """A layer gives NaN, in the first computation and in the second; the other layers' tokens are in order in both."""
    spoiled = []
    sparse = token_attention.TokenAttention.sparse

    def spoil(self, which, at, *args, **kwargs):
        head, tail, stats = sparse(self, which, at, *args, **kwargs)
        if which.name == layer and at.step == 1 and len(spoiled) < 2:
            spoiled.append(at)
            head = head * torch.nan
        return head, tail, stats

    monkeypatch.setattr(token_attention.TokenAttention, "sparse", spoil)
    found = []
    pipe = case.make()
    for reorders in (False, True):
        spoiled.clear()
        seen.clear()
        with pytest.warns(UserWarning, match="not finite"), apply_psa(pipe, SPARSE) as psa:
            psa.processor.reorders_tokens = reorders
            found.append(case.run(pipe))
        assert len(spoiled) == 2 and "not finite" in str(psa.stats().fallbacks) and set(seen) == {reorders}
    assert found[0].isfinite().all()
    assert_equal_to_rounding(*found)


def test_half_a_reordering_is_an_error(monkeypatch):
    pipe = WAN.make()
    monkeypatch.setattr(Reordering, "_move_tokens", lambda *_: None)
    with apply_psa(pipe, SPARSE), pytest.raises(RuntimeError, match="order: raster"):
        WAN.run(pipe)


def test_the_transformer_is_not_kept_alive():
    pipe = WAN.make()
    with apply_psa(pipe, SPARSE) as psa:
        WAN.run(pipe)
    found = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert found() is None and psa is not None
