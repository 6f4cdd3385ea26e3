"""Tiny random language and vision-language models of transformers, and a prompt with a video for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from psa_presets import Preset

# What tests patch with: everything kept, and a part of a prompt that counts as long.
FULL = Preset(block={"query": 32, "key": 16}, levels=[1], thresholds=[1.0])
SPARSE = Preset(block={"query": 32, "key": 16}, rule="budget", density=0.3)
SMALL = {"min_tokens": 64, "dense_last": 4}

VOCABULARY, IMAGE, VIDEO, START, END, PAD = 200, 190, 191, 192, 193, 0
FRAMES, PER_FRAME = 10, 16
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # larger than usual, so that attention is not even
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 32, "patch_size": 4}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
LAYERS = ["linear_attention", "full_attention"]


def words(count: int, seed: int = 0) -> list[int]:
    """Ids of text tokens, none of which means anything."""
    return torch.randint(3, 180, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompt(vision: list[int], before: int = 5, after: int = 9) -> dict[str, Any]:
    """Text, the vision tokens of a video, text: ids and a mask `[1, N]`."""
    ids = torch.tensor([words(before, 1) + vision + words(after, 2)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def text_model(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    import transformers

    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = kind(**(TEXT | {"head_dim": 8} | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config), prompt(words(FRAMES * PER_FRAME))


def qwen_video(per_frame: Callable[[int], list[int]], frames: int = 3, patch: int = 14) -> dict[str, Any]:
    """What the processor of a Qwen model gives for a video of 16 x 16 patches a frame, 64 tokens."""
    vision = [token for _ in range(frames) for token in per_frame(64)]
    given = prompt(vision)
    types = torch.where(given["input_ids"] == VIDEO, 2, 0)
    pixels = noise(frames * 256, 3 * 2 * patch * patch)
    return given | {
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[frames, 16, 16]]),
        "mm_token_type_ids": types,
    }


def qwen2_5_vl(**vision: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE},
        vision_config=tower | {"fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14} | vision,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **IDS,
    )
    return Qwen2_5_VLForConditionalGeneration(config), qwen_video(lambda tokens: [VIDEO] * tokens)


QWEN3_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 64,
}


def qwen3_vl() -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}},
        vision_config=QWEN3_TOWER,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **IDS,
    )
    # Times and markers stand between the frames.
    video = qwen_video(lambda tokens: [*words(2), START, *[VIDEO] * tokens, END], patch=16)
    return Qwen3VLForConditionalGeneration(config), video


def qwen3_omni() -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config = Qwen3OmniMoeThinkerConfig(
        text_config=TEXT | experts | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}},
        vision_config=QWEN3_TOWER,
        audio_config={
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "d_model": 16,
            "output_dim": 32,
            "downsample_hidden_size": 8,
            "num_mel_bins": 16,
        },
        audio_token_id=194,
        audio_start_token_id=195,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **IDS,
    )
    video = qwen_video(lambda tokens: [VIDEO] * tokens, patch=16)
    del video["mm_token_type_ids"]  # its processor gives none
    video["input_ids"][0, 4], video["input_ids"][0, -9] = START, END
    return Qwen3OmniMoeThinkerForConditionalGeneration(config), video | {"video_second_per_grid": torch.tensor([1.0])}


def llava_onevision() -> tuple[Any, dict[str, Any]]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=TOWER | IMAGES | {"model_type": "siglip_vision_model"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    frames = noise(1, FRAMES, 3, 32, 32)
    given = prompt([VIDEO] * (FRAMES * PER_FRAME + 1))  # a new line ends the video
    return LlavaOnevisionForConditionalGeneration(config), given | {"pixel_values_videos": frames}


def llava_next_video() -> tuple[Any, dict[str, Any]]:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=TOWER | IMAGES | {"model_type": "clip_vision_model"},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    given = prompt([VIDEO] * FRAMES * PER_FRAME)
    return LlavaNextVideoForConditionalGeneration(config), given | {"pixel_values_videos": noise(1, FRAMES, 3, 32, 32)}


def internvl() -> tuple[Any, dict[str, Any]]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=TOWER | {"image_size": [32, 32], "patch_size": [4, 4]},
        image_token_id=IMAGE,
    )
    frames = [token for _ in range(FRAMES) for token in [*words(3), *[IMAGE] * PER_FRAME]]
    return InternVLForConditionalGeneration(config), prompt(frames) | {"pixel_values": noise(FRAMES, 3, 32, 32)}


def smolvlm() -> tuple[Any, dict[str, Any]]:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=TOWER | IMAGES,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    frames = [token for _ in range(FRAMES) for token in [*words(2), *[IMAGE] * PER_FRAME]]
    return SmolVLMForConditionalGeneration(config), prompt(frames) | {"pixel_values": noise(1, FRAMES, 3, 32, 32)}


def qwen3_5() -> tuple[Any, dict[str, Any]]:
    """Every other layer has linear attention; the others have heads of 256."""
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    changes = linear | {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": LAYERS}
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**(TEXT | changes))), prompt(words(FRAMES * PER_FRAME))


# What each class needs of transformers is looked up when it is made: older versions lack some.
FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_omni": qwen3_omni,
    "llava_onevision": llava_onevision,
    "llava_next_video": llava_next_video,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "llama": lambda: text_model("Llama"),
    "qwen2": lambda: text_model("Qwen2"),
    "qwen3": lambda: text_model("Qwen3"),
    "mistral": lambda: text_model("Mistral", sliding_window=None),
    "qwen3_5": qwen3_5,
}


def tiny(family: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model in evaluation mode, always the same, and what its processor would give for a prompt with a video.

    Args:
        changes: to the configuration of a text model, which is then made by the name of its class.
    """
    torch.manual_seed(0)
    model, given = FAMILIES[family]() if family in FAMILIES else text_model(family, **changes)
    return model.eval(), given


def forward(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """The logits of a forward without gradients."""
    with torch.no_grad():
        logits: torch.Tensor = model(**given).logits
    return logits


def registered() -> tuple[set[str], set[str]]:
    """The names of all attention functions, and of all that make masks, but for those that a patch may get again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from psa_transformers.names import named

    def used(registry: Any) -> set[str]:
        return {key for key in registry().valid_keys() if (ours := named(key)) is None or not ours.is_free}

    return used(AttentionInterface), used(AttentionMaskInterface)
