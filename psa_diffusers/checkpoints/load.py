"""From `--model` to a loaded pipeline: what it names, what its configuration says, and loading its weights."""

import difflib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.checkpoints.components import check_values, listed_parts, load_component, one_line
from psa_diffusers.checkpoints.kinds import IN_CODE_ONLY, PIPELINE_KINDS, PipelineKind
from psa_diffusers.errors import InputError
from psa_diffusers.families.card import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, ModelCard

if TYPE_CHECKING:
    import torch

# The second two where the pipeline has a place for them.
NEEDED = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "text_encoder_2", "tokenizer_2")
DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True)
class Model:
    """What `--model` named, as far as its configuration files tell.

    `source` is a hub id or an absolute folder. A video's height and width are multiples of `size_step`, its frames
    a multiple of `frame_step` plus the kind's `frame_rest`. `num_layers` counts the transformer blocks, `experts` the
    transformers, `num_heads` the heads of an attention (None: the configuration does not say). `fixed_size` is the only
    height and width of a model that can make no other.
    """

    name: str
    source: str
    card: ModelCard
    size_step: int
    frame_step: int
    num_layers: int
    experts: int
    num_heads: int | None = None
    fixed_size: tuple[int, int] | None = None

    @property
    def kind(self) -> PipelineKind:
        return PIPELINE_KINDS[self.card.pipeline]

    @property
    def takes_image(self) -> bool:
        return self.kind.takes_image


def resolve_model(name: str) -> Model:
    """Finds an alias, a folder that holds a pipeline, or a hub id, and reads its configuration but no weights.

    Raises:
        InputError: nothing of that name, its configuration cannot be had (offline), or its pipeline is of another kind.
    """
    if name in MODELS:
        card = MODELS[name]
        source = str(DEMO_FOLDER) if card.hub_id is None else card.hub_id
        if card.hub_id is None and not (DEMO_FOLDER / "model_index.json").is_file():
            raise InputError(f"--model {name}: this installation does not hold the demo's weights ({DEMO_FOLDER})")
        index = _read_json(source, "model_index.json", card.revision)
    elif os.path.exists(name):
        source = str(Path(name).resolve())
        if not Path(source, "model_index.json").is_file():
            raise InputError(
                f"--model {name}: no model_index.json there; give the folder of a saved diffusers pipeline"
            )
        index = _read_json(source, "model_index.json")
        card = _card_for(source, _known_pipeline(name, index))
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        source = name
        # A known repository may hold its pipeline in another branch than main.
        revision = next((card.revision for card in MODELS.values() if card.hub_id == name), None)
        index = _read_json(source, "model_index.json", revision)
        card = _card_for(source, _known_pipeline(name, index), revision)
    else:
        raise InputError(_unknown(name))
    return _with_configuration(name, source, card, index)


def load_pipeline(model: Model, *, dtype: str, device: str, offload: str, flow_shift: float | None = None) -> Any:
    """Loads the pipeline and puts it where it is to run.

    Args:
        dtype: name of a torch dtype, for everything but a VAE that its card runs in float32.
        device: "cpu", "cuda", "cuda:1", "mps".
        offload: "none", "model" (one component at a time on the GPU) or "group" (one layer at a time).
        flow_shift: replaces the scheduler's; None keeps it.

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
    if flow_shift is not None:
        _set_flow_shift(pipe, flow_shift)
    if model.kind.tiled_vae:
        pipe.vae.enable_tiling()
    if offload == "model":
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
    index = _read_json(model.source, "model_index.json", revision)
    listed = {part.name: part for part in listed_parts(index, pipeline_class, model.source, revision)}
    parts, takes = {**listed, **replaced}, inspect.signature(pipeline_class).parameters
    absent = [name for name in NEEDED if name in takes and name not in parts]
    if absent:
        raise InputError(f"model_index.json has no {absent[0]}")
    components = {}
    for name, part in parts.items():
        exact = name == "vae" and part.type == model.kind.exact_vae
        components[name] = load_component(part, torch.float32 if exact else dtype)
    try:
        pipe = pipeline_class.from_pretrained(
            model.source, **components, revision=revision, torch_dtype=dtype, use_safetensors=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as in load_component
        raise InputError(one_line(error)) from error
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            check_values(name, component)
    return pipe


def current_flow_shift(pipe: Any) -> float | None:
    """The shift that the pipeline's scheduler runs with, None where it has none."""
    config = pipe.scheduler.config
    return config.get("flow_shift", config.get("shift"))


def _set_flow_shift(pipe: Any, value: float) -> None:
    key = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{key: value})


def _quiet_unless_terminal() -> None:
    if sys.stderr.isatty():
        return
    for name in ("diffusers.utils.logging", "transformers.utils.logging", "huggingface_hub.utils"):
        module = importlib.import_module(name)
        for switch in ("disable_progress_bar", "disable_progress_bars"):
            getattr(module, switch, lambda: None)()


def _with_configuration(name: str, source: str, card: ModelCard, index: dict[str, Any]) -> Model:
    kind = PIPELINE_KINDS[card.pipeline]
    for package in kind.packages:
        if not is_installed(package):
            raise InputError(f"--model {name}: {card.pipeline} needs the package {package}, which is not installed")
    vae = _read_json(source, "vae/config.json", card.revision)
    repository, file = card.transformer
    elsewhere = repository if card.parts else None
    transformer = _read_json(elsewhere or source, file, None if elsewhere else card.revision)
    heads = transformer.get("num_attention_heads")
    try:
        size_step, frame_step = kind.steps(vae, transformer)
        layers = kind.layer_count(transformer)
    except (TypeError, ValueError, LookupError) as error:
        raise InputError(f"--model {name}: vae/config.json or {file} is damaged: {error}") from error
    for what, value in (("layers", layers), ("heads", 1 if heads is None else heads), ("size", size_step * frame_step)):
        if type(value) is not int or value < 1:
            raise InputError(f"--model {name}: vae/config.json or {file} is damaged: number of {what} is {value!r}")
    # Positions that were learned: CogVideoX 5B's image-to-video model.
    second, fixed = index.get("transformer_2"), transformer.get("use_learned_positional_embeddings", False)
    return Model(
        name=name,
        source=source,
        card=card,
        size_step=size_step,
        frame_step=frame_step,
        num_layers=layers,
        num_heads=heads,
        fixed_size=(card.height, card.width) if fixed else None,
        experts=2 if isinstance(second, list) and second[-1:] != [None] else 1,
    )


def _known_pipeline(name: str, index: dict[str, Any]) -> str:
    pipeline = index.get("_class_name")
    if isinstance(pipeline, str) and pipeline in IN_CODE_ONLY:
        raise InputError(f"--model {name}: it is a {pipeline}: {IN_CODE_ONLY[pipeline]}")
    if not isinstance(pipeline, str) or pipeline not in PIPELINE_KINDS:
        raise InputError(f"--model {name}: it is a {pipeline}; supported are {', '.join(PIPELINE_KINDS)}")
    return pipeline


def _card_for(source: str, pipeline: str, revision: str | None = None) -> ModelCard:
    """The card of a hub id or a local folder.

    A known hub id, or a folder that carries the name of a known repository, has that model's settings. Any other model
    has no negative prompt and the settings of the first alias with the same pipeline; Wan's pipelines, which serve
    models of several sizes, have the defaults of diffusers.
    """
    repository = source.rstrip("/").rsplit("/", 1)[-1]
    cards = [card for card in MODELS.values() if card.pipeline == pipeline]
    for card in cards:
        if card.hub_id is not None and card.hub_id.endswith("/" + repository) and not card.parts:
            return card if card.revision == revision else replace(card, revision=revision)
    plain = ModelCard(source, hub_id=None, about="", pipeline=pipeline)
    nearest = plain if pipeline in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO) else cards[0]
    plain_settings: dict[str, Any] = {"negative_prompt": "", "flow_shift": None, "parts": (), "revision": revision}
    return replace(nearest, name=source, hub_id=None, about="", **plain_settings)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"--model {name}: no such model{hint}; allowed: {', '.join(MODELS)}, a hub id (owner/name), "
        "or a folder with a model_index.json"
    )


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without doing so."""
    return importlib.util.find_spec(package) is not None


def _read_json(source: str, file: str, revision: str | None = None) -> dict[str, Any]:
    path = Path(source, file) if os.path.isdir(source) else _from_hub(source, file, revision)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--model {source}: cannot read {file} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"--model {source}: {file} is not a JSON object")
    return content


def _from_hub(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set and the model is not in the local cache; unset it to download the model"
        else:
            reason = "the hub cannot be reached and the model is not in the local cache"
        raise InputError(f"--model {repository}: {reason}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"--model {repository}: the hub has no such model, or it needs a login") from error
    except errors.EntryNotFoundError as error:
        raise InputError(f"--model {repository}: it has no {file}, so it is not a saved pipeline") from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise InputError(f"--model {repository}: cannot fetch {file} ({type(error).__name__})") from error
