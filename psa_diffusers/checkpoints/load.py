"""From what `--model` named to a loaded pipeline."""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from psa_diffusers.checkpoints.components import check_values, listed_parts, load_component, one_line
from psa_diffusers.checkpoints.configurations import INDEX, index_file, read_json
from psa_diffusers.checkpoints.lora import Lora, load_loras
from psa_diffusers.checkpoints.modular import assemble_modular, place_modular
from psa_diffusers.checkpoints.resolve import Model
from psa_diffusers.checkpoints.schedulers import adjusted
from psa_diffusers.errors import InputError, with_extra
from psa_diffusers.families.card import Part

if TYPE_CHECKING:
    import torch

# The second two where the pipeline has a place for them.
NEEDED = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "text_encoder_2", "tokenizer_2")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


def import_pipeline(model: Model) -> None:
    """Import most of what loading the model needs, which takes seconds and can so be timed apart."""
    import diffusers

    getattr(diffusers, model.card.pipeline, None)


def load_pipeline(
    model: Model,
    *,
    dtype: str,
    device: str,
    offload: str,
    flow_shift: float | None = None,
    loras: Sequence[Lora] = (),
    tell: Callable[[str], None] = _warn,
) -> Any:
    """Load the pipeline and put it where it is to run.

    Args:
        dtype: name of a torch dtype, for everything but a VAE that its card runs in float32.
        device: "cpu", "cuda", "cuda:1", "mps".
        offload: "none", "model" (one component at a time on the GPU) or "group" (one layer at a time).
        flow_shift: replaces the scheduler's; None keeps it.
        loras: added to its transformers.
        tell: called with a line about each of them that does not fit in part.

    Raises:
        InputError: files are missing or damaged, are not safetensors, or do not belong together.
    """
    import torch

    _quiet_unless_terminal()
    with warnings.catch_warnings():
        # The new name is `dtype`, which the oldest diffusers that this package supports does not know.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        try:
            pipe = _load_whole(model, getattr(torch, dtype))
        except InputError as error:
            raise InputError(f"--model {model.name}: cannot be loaded: {error}") from error
    for line in load_loras(pipe, loras) if loras else ():
        tell(line)
    if flow_shift is not None or model.card.scheduler:
        pipe.scheduler = adjusted(pipe.scheduler, model.card, flow_shift)
    if model.kind.tiled_vae:
        pipe.vae.enable_tiling()
    if model.kind.modular:
        place_modular(pipe, device, offload)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level", use_stream=True)
    else:
        pipe.to(device)
    return pipe


def _load_whole(model: Model, dtype: "torch.dtype") -> Any:
    """The pipeline, of which every component is whole."""
    import diffusers
    import torch

    pipeline_class = getattr(diffusers, model.card.pipeline, None)
    if pipeline_class is None:
        raise InputError(f"diffusers {diffusers.__version__} has no {model.card.pipeline}")
    replaced = {part.name: part for part in model.card.parts}
    revision = model.card.revision
    index = read_json(model.source, index_file(model.kind), revision)

    def load(part: Part) -> Any:
        exact = part.name == "vae" and part.type == model.kind.exact_vae
        return load_component(part, torch.float32 if exact else dtype)

    if model.kind.modular:
        build = partial(
            assemble_modular, pipeline_class, index, model.source, model.kind.workflows, replaced=replaced, load=load
        )
    else:
        listed = {part.name: part for part in listed_parts(index, pipeline_class, model.source, revision)}
        parts, takes = {**listed, **replaced}, inspect.signature(pipeline_class).parameters
        absent = [name for name in NEEDED if name in takes and name not in parts]
        if absent:
            raise InputError(f"{INDEX} has no {absent[0]}")
        settings = {"revision": revision, "torch_dtype": dtype, "use_safetensors": True}
        settings |= {name: load(part) for name, part in parts.items()}
        build = partial(pipeline_class.from_pretrained, model.source, **settings)
    try:
        pipe = build()
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # as in load_component
        raise InputError(with_extra(one_line(error))) from error
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            check_values(name, component)
    return pipe


def current_flow_shift(pipe: Any) -> float | None:
    """The shift that the pipeline's scheduler runs with, None where it has none."""
    config = pipe.scheduler.config
    return config.get("flow_shift", config.get("shift"))


def _quiet_unless_terminal() -> None:
    if sys.stderr.isatty():
        return
    for name in ("diffusers.utils.logging", "transformers.utils.logging", "huggingface_hub.utils"):
        module = importlib.import_module(name)
        for switch in ("disable_progress_bar", "disable_progress_bars"):
            getattr(module, switch, lambda: None)()
