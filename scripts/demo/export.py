"""Writes the trained parts as a WanPipeline folder, and reads one back to go on training."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

FLOW_SHIFT = 3.0


def export(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    encoder: UMT5EncoderModel,
    vae: AutoencoderKLWan,
    denoiser: WanTransformer3DModel,
) -> None:
    """Saves safetensors that `WanPipeline.from_pretrained(folder)` loads.

    Halved to float16 but for the text encoder: transformers loads what is stored, and it is small.
    """
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_copy(encoder, UMT5EncoderModel(encoder.config)),
        vae=_copy(vae, AutoencoderKLWan.from_config(vae.config)).half(),
        transformer=_copy(denoiser, WanTransformer3DModel.from_config(denoiser.config)).half(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        _name_tokenizer_class(folder / name)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def load(
    folder: Path, device: torch.device
) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel, AutoencoderKLWan, WanTransformer3DModel]:
    """Tokenizer, text encoder, autoencoder and denoiser of an exported folder, in float32, for more training."""
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    parts = (pipeline.text_encoder, pipeline.vae, pipeline.transformer)
    return pipeline.tokenizer, *(part.to(device).float().train() for part in parts)


def _copy(trained: torch.nn.Module, empty: torch.nn.Module) -> torch.nn.Module:
    empty.load_state_dict({name: tensor.cpu() for name, tensor in trained.state_dict().items()})
    return empty


def _name_tokenizer_class(file: Path) -> None:
    """transformers 5 writes a class name that transformers 4 does not have; both know this one."""
    text = json.dumps(json.loads(file.read_text()), indent=2) + "\n"
    file.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"))
