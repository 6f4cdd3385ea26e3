"""Beside what else is done to a pipeline: whole-model compile, quantised weights, LoRA, callbacks, threads, saving."""

from __future__ import annotations

import threading

import peft
import pytest
import torch
from diffusers import WanPipeline

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_testing.spies import spoil_sparse
from psa_testing.tiny_families import CASES, EVERYTHING, WAN, assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["compile()", "torch.compile()"])
def test_the_whole_transformer_compiled(how, monkeypatch):
    pipe = WAN.make()
    with apply_psa(pipe, preset(), strict=True) as psa:
        eager, stats = WAN.run(pipe), psa.stats()
    if how == "compile()":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with apply_psa(pipe, preset()) as psa:
        assert_equal_to_rounding(WAN.run(pipe), eager)
        assert psa.stats() == stats
        if how == "torch.compile()":  # the same from here on
            return
        spoil_sparse(monkeypatch, layers=("blocks.1",), steps=(2,))
        with pytest.warns(PSAFallbackWarning, match="blocks.1 at step 3 of 4: its sparse output held values that are"):
            assert WAN.run(pipe).isfinite().all()
        assert psa.stats().not_finite == {"blocks.1": [2]}


def quantise_with_torchao(transformer):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(transformer, torchao.Int8WeightOnlyConfig())


def quantise_with_bitsandbytes(transformer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, module in list(transformer.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            linear = bitsandbytes.nn.LinearNF4(module.in_features, module.out_features, module.bias is not None)
            linear.load_state_dict(module.state_dict())
            transformer.set_submodule(name, linear.to("cpu"))


def quantise_as_gguf(transformer):
    """As diffusers does when it loads a GGUF file: linear layers keep packed weights and unpack them in each call."""
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for name, module in list(transformer.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            packed = torch.from_numpy(gguf.quants.quantize(module.weight.detach().numpy(), kind))
            linear = GGUFLinear(module.in_features, module.out_features, module.bias is not None, torch.float32)
            linear.weight = GGUFParameter(packed, quant_type=kind)
            linear.bias = module.bias
            transformer.set_submodule(name, linear)


QUANTISED = {
    "torchao": quantise_with_torchao,
    "bitsandbytes": quantise_with_bitsandbytes,
    "gguf": quantise_as_gguf,
}


@pytest.mark.parametrize("package", QUANTISED)
def test_quantised_weights(package):
    pipe = WAN.make()
    unquantised = WAN.run(pipe)
    QUANTISED[package](pipe.transformer)
    stock = WAN.run(pipe)
    assert stock.isfinite().all() and not torch.equal(stock, unquantised)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(WAN.run(pipe), stock)
    with apply_psa(pipe, preset(), strict=True) as psa:
        assert WAN.run(pipe).isfinite().all()
    assert 0.2 < psa.stats().density_sparse < 0.5


def test_lora_switched_fused_and_removed_while_patched():
    pipe = WAN.make()
    plain = WAN.run(pipe)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    with apply_psa(pipe, EVERYTHING, strict=True):
        seen = {}
        for name in ("one", "other"):
            pipe.transformer.add_adapter(config, adapter_name=name)
        for name in ("one", "other"):
            pipe.transformer.set_adapters([name])
            seen[name] = WAN.run(pipe)
        assert not torch.equal(seen["one"], seen["other"]) and not torch.equal(seen["one"], plain)
        pipe.transformer.set_adapters(["one"])
        pipe.transformer.fuse_lora(adapter_names=["one"])
        assert_equal_to_rounding(WAN.run(pipe), seen["one"])
        pipe.transformer.unfuse_lora()
        pipe.transformer.disable_adapters()
        assert_equal_to_rounding(WAN.run(pipe), plain)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_few_steps_of_a_distilled_model(guidance):
    """Four steps, one of them dense; without guidance there is one forward a step."""
    pipe = WAN.make()
    with apply_psa(pipe, preset(), strict=True) as psa:
        WAN.run(pipe, guidance_scale=guidance)
    stats = psa.stats()
    assert (stats.steps, stats.dense_steps) == (4, 1)
    assert [row[0] == 1 for row in stats.density] == [True, False, False, False]
    stock = WAN.run(pipe, guidance_scale=guidance)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(WAN.run(pipe, guidance_scale=guidance), stock)


@pytest.mark.parametrize("changes", [{}, {"share_guidance": True, "refresh": 2}], ids=["own-lists", "shared-lists"])
def test_a_callback_that_switches_guidance_off_midway(changes):
    pipe = WAN.make()

    def switch(pipe, index, timestep, values):
        if index == 1:
            pipe._guidance_scale = 1.0
        return {}

    stock = WAN.run(pipe, callback_on_step_end=switch)
    assert not torch.equal(stock, WAN.run(pipe))
    with apply_psa(pipe, EVERYTHING.replace(**changes), strict=True):
        assert_equal_to_rounding(WAN.run(pipe, callback_on_step_end=switch), stock)
    with apply_psa(pipe, preset(**changes), strict=True) as psa:
        first = WAN.run(pipe, callback_on_step_end=switch)
        assert torch.equal(WAN.run(pipe, callback_on_step_end=switch), first)
    assert psa.stats().steps == 4 and all(value is not None for row in psa.stats().density for value in row)


def test_one_pipeline_called_from_two_threads_one_after_the_other():
    pipe = WAN.make()
    results = []
    with apply_psa(pipe, preset(), strict=True) as psa:
        results.append(WAN.run(pipe))
        for _ in range(2):
            thread = threading.Thread(target=lambda: results.append(WAN.run(pipe)))
            thread.start()
            thread.join()
    assert len(results) == 3 and all(torch.equal(result, results[0]) for result in results)
    assert psa.stats().fallbacks == {}


def test_a_patched_pipeline_saved_and_loaded_is_a_stock_one(tmp_path):
    """To rounding: loaded weights lie elsewhere in memory, and BLAS sums in an order that depends on it."""
    pipe = WAN.make()
    stock = WAN.run(pipe)
    with apply_psa(pipe, preset(), strict=True):
        sparse = WAN.run(pipe)
        pipe.save_pretrained(tmp_path)
    assert not torch.allclose(sparse, stock, atol=1e-3)
    loaded = WanPipeline.from_pretrained(tmp_path)
    assert_equal_to_rounding(WAN.run(loaded), stock)
    loaded.transformer.set_attn_processor(PSAProcessor(loaded, preset=EVERYTHING, strict=True))
    assert_equal_to_rounding(WAN.run(loaded), stock)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox-5b"])
def test_offload_on_a_gpu(kind, name):
    case = WAN if name == "wan" else CASES[name]
    stock = case.run(case.make().to("cuda")).cpu()
    pipe = case.make()
    if kind == "group":
        pipe.transformer.enable_group_offload(torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level")
        for part in (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if part is not None:
                part.to("cuda")
    else:
        getattr(pipe, f"enable_{kind}_cpu_offload")()
    served = EVERYTHING.replace(block={"query": 64, "key": 16}, float32_on_gpu="sparse")
    with apply_psa(pipe, served, strict=False) as psa:
        torch.testing.assert_close(case.run(pipe).cpu(), stock, rtol=0, atol=2e-3)
    assert psa.stats().density_sparse == 1 and psa.stats().implementation != "reference"
