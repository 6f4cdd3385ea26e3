"""What else is done to a pipeline of any family: LoRA, casting, offload, fused projections, other processors."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.families import find_family
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.families import CASES, ONE_EACH, TESTS_OF
from psa_testing.group_offload import offload_groups
from psa_testing.tiny_families import EVERYTHING, SPARSE, WAN, assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")

EACH = {name: CASES[name] for name in ONE_EACH}


def layers_of(pipe):
    return find_family(pipe.transformer).self_attentions(pipe.transformer).values()


def widened(output):
    """What a transformer gives, in float32."""
    if isinstance(output, tuple):
        return tuple(x.float() for x in output)
    return type(output)(**{name: x.float() for name, x in output.items()})


def make_bfloat16(transformer):
    """As `from_pretrained(torch_dtype=torch.bfloat16)` does: some modules of some models stay in float32."""
    keep = transformer._keep_in_fp32_modules or ()
    transformer.to(torch.bfloat16)
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in keep:
            module.float()


def run_in_its_dtype(case, pipe):
    """Run a pipeline whose transformer has another dtype than its other parts."""
    dtype = pipe.transformer.dtype

    def cast(value):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    def cast_all(module, args, kwargs):
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    hooks = [pipe.transformer.register_forward_pre_hook(cast_all, with_kwargs=True)]
    hooks.append(pipe.transformer.register_forward_hook(lambda module, args, output: widened(output)))
    try:
        return case.run(pipe)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", [name for name in EACH if TESTS_OF[name].takes_lora])
def test_lora(name):
    case, pipe = EACH[name], EACH[name].make()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_v_proj", "to_add_out"]
    targets += ["to_query", "to_key", "to_value", "self_attention.out_layer"]
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted = case.run(pipe)
    assert not torch.equal(adapted, case.stock)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), adapted)


def test_a_lora_file_loaded_into_a_patched_pipeline(tmp_path):
    trained = WAN.make()
    stock = WAN.run(trained)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    # The file has no alpha; without one it is taken to be the rank.
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    trained.transformer.add_adapter(config)
    adapted = WAN.run(trained)
    assert not torch.equal(adapted, stock)
    layers = peft.get_peft_model_state_dict(trained.transformer)
    type(trained).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipe = WAN.make()
    with apply_psa(pipe, EVERYTHING, strict=True):
        pipe.load_lora_weights(tmp_path)
        assert_equal_to_rounding(WAN.run(pipe), adapted)


@pytest.mark.parametrize("name", EACH)
def test_layerwise_casting(name):
    case, pipe = EACH[name], EACH[name].make()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stock = case.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), stock)


@pytest.mark.parametrize("name", EACH)
def test_group_offload(name):
    case, pipe = EACH[name], EACH[name].make()
    offload_groups(pipe.transformer)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), case.stock)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox-5b"])
def test_model_offload(name):
    case, pipe = EACH[name], EACH[name].make()
    pipe.enable_model_cpu_offload(device="cpu")
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), case.stock)


@pytest.mark.parametrize("name", EACH)
def test_bfloat16(name):
    case, pipe = EACH[name], EACH[name].make()
    make_bfloat16(pipe.transformer)
    with apply_psa(pipe, preset(), strict=True) as psa:
        seen = []
        hook = next(iter(layers_of(pipe))).register_forward_hook(lambda module, args, output: seen.append(output))
        run_in_its_dtype(case, pipe)
        hook.remove()
    assert psa.stats().density_sparse < 0.5
    outputs = [x for output in seen for x in (output if isinstance(output, tuple) else (output,)) if x is not None]
    assert outputs and all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in outputs)


def test_cogvideox_fused_before_the_patch():
    case, pipe = CASES["cogvideox-5b"], CASES["cogvideox-5b"].make()
    pipe.transformer.fuse_qkv_projections()
    stock = case.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), stock)
    with apply_psa(pipe, preset(dense_steps=1.0)):
        assert torch.equal(case.run(pipe), stock)
    assert type(next(iter(layers_of(pipe))).processor).__name__ == "FusedCogVideoXAttnProcessor2_0"


def test_cogvideox_fused_after_the_patch_is_noticed():
    """Its `fuse_qkv_projections` replaces all processors, so PSA would be lost in silence."""
    case, pipe = CASES["cogvideox-5b"], CASES["cogvideox-5b"].make()
    stock = case.run(pipe)
    with apply_psa(pipe, preset()) as psa:
        sparse = case.run(pipe)
        pipe.transformer.fuse_qkv_projections()
        with pytest.warns(PSAFallbackWarning, match="FusedCogVideoXAttnProcessor2_0, replaced PSAProcessor") as caught:
            assert_equal_to_rounding(case.run(pipe), stock)
        assert len([w for w in caught if w.category is PSAFallbackWarning]) == 1
        stats = psa.stats()
        assert stats.density_run == 1 and stats.density_sparse is None
        assert list(stats.fallbacks.values()) == [3 * 3]
        pipe.transformer.unfuse_qkv_projections()
        assert torch.equal(case.run(pipe), sparse)
    with apply_psa(pipe, preset(), strict=True):
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(PSAFallbackError, match="replaced PSAProcessor"):
            case.run(pipe)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fuses])
def test_fused_projections(name):
    """Against stock that is fused too: in diffusers 0.36 VACE itself gives something else then."""
    case, pipe = CASES[name], CASES[name].make()
    fused = case.make()
    fused.transformer.fuse_qkv_projections()
    stock = case.run(fused)
    with apply_psa(pipe, EVERYTHING, strict=True):
        pipe.transformer.fuse_qkv_projections()
        assert_equal_to_rounding(case.run(pipe), stock)


def test_removing_the_patch_by_hand_is_no_fault():
    case, pipe = CASES["cogvideox-5b"], CASES["cogvideox-5b"].make()
    originals = dict(pipe.transformer.attn_processors)
    stock = case.run(pipe)
    apply_psa(pipe, SPARSE, strict=True)
    pipe.transformer.set_attn_processor(originals)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSAFallbackWarning)
        assert torch.equal(case.run(pipe), stock)
