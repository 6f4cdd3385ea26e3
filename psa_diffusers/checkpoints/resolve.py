"""From `--model` to what its configuration says: which pipeline it names, and how large its videos may be."""

import difflib
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.checkpoints.configurations import INDEX, index_file, read_json
from psa_diffusers.checkpoints.kinds import IN_CODE_ONLY, PIPELINE_KINDS, PipelineKind
from psa_diffusers.checkpoints.modular import MODULAR_INDEX, listed_modular_parts
from psa_diffusers.errors import InputError, how_to_install
from psa_diffusers.families.card import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, ModelCard

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True)
class Model:
    """What `--model` named, as far as its configuration files tell.

    `source` is a hub id or an absolute folder. A video's height and width are multiples of `size_step`, its frames
    a multiple of `frame_step` plus the kind's `frame_rest`. `num_layers` counts the transformer blocks, `experts` the
    transformers, `num_heads` the heads of an attention and `head_dim` the channels of a head (None: the configuration
    does not say). `fixed_size` is the only height and width of a model that can make no other, `image_size` what the
    kind's is for this model. `token_grid` is the kind's: from frames, height, width and whether there is an image to
    video tokens along each.
    """

    name: str
    source: str
    card: ModelCard
    size_step: int
    frame_step: int
    num_layers: int
    experts: int
    token_grid: Callable[..., tuple[int, int, int]]
    num_heads: int | None = None
    head_dim: int | None = None
    fixed_size: tuple[int, int] | None = None
    image_size: Callable[[int, int], tuple[int, int]] | None = None

    @property
    def kind(self) -> PipelineKind:
        return PIPELINE_KINDS[self.card.pipeline]

    @property
    def takes_image(self) -> bool:
        return self.kind.takes_image

    def dense_work(self, frames: int, height: int, width: int, with_image: bool) -> int | None:
        """Floating point operations of one dense attention among video tokens; None if that is not known."""
        if self.num_heads is None or self.head_dim is None:
            return None
        tokens = math.prod(self.token_grid(frames, height, width, with_image=with_image))
        return 4 * tokens * tokens * self.num_heads * self.head_dim


def resolve_model(name: str) -> Model:
    """Find an alias, a folder that holds a pipeline, or a hub id, and read its configuration but no weights.

    Raises:
        InputError: nothing of that name, its configuration cannot be had (offline), or its pipeline is of another kind.
    """
    if name in MODELS:
        card = MODELS[name]
        source = str(DEMO_FOLDER) if card.hub_id is None else card.hub_id
        if card.hub_id is None and not (DEMO_FOLDER / "model_index.json").is_file():
            raise InputError(f"--model {name}: this installation does not hold the demo's weights ({DEMO_FOLDER})")
        index = read_json(source, index_file(PIPELINE_KINDS[card.pipeline]), card.revision)
    elif os.path.exists(name):
        source = str(Path(name).resolve())
        file = next((file for file in (INDEX, MODULAR_INDEX) if Path(source, file).is_file()), None)
        if file is None:
            raise InputError(f"--model {name}: no {INDEX} there; give the folder of a saved diffusers pipeline")
        index = read_json(source, file)
        card = _card_for(source, _known_pipeline(name, index, modular=file == MODULAR_INDEX))
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        source = name
        # A known repository may hold its pipeline in another branch than main.
        revision = next((card.revision for card in MODELS.values() if card.hub_id == name), None)
        index, modular = _index_from_hub(source, revision)
        card = _card_for(source, _known_pipeline(name, index, modular), revision)
    else:
        raise InputError(_unknown(name))
    return _with_configuration(name, source, card, index)


def _index_from_hub(source: str, revision: str | None) -> tuple[dict[str, Any], bool]:
    """The index of a repository, and whether it is that of a modular pipeline, because it has no other."""
    try:
        return read_json(source, INDEX, revision), False
    except InputError:  # also where only the modular one is in the cache
        try:
            return read_json(source, MODULAR_INDEX, revision), True
        except InputError:
            pass
        raise


def _with_configuration(name: str, source: str, card: ModelCard, index: dict[str, Any]) -> Model:
    kind = PIPELINE_KINDS[card.pipeline]
    for package in kind.packages:
        if not is_installed(package):
            needed = f"{card.pipeline} needs the package {package}, which is not installed; {how_to_install(package)}"
            raise InputError(f"--model {name}: {needed}")
    vae, transformer = (configuration(name, part, source, card, index) for part in ("vae", "transformer"))
    file = card.transformer[1]
    heads, head_dim = (transformer.get(key) for key in ("num_attention_heads", "attention_head_dim"))
    try:
        size_step, frame_step = kind.steps(vae, transformer)
        layers = kind.layer_count(transformer)
        # A plan goes to other processes, so this is no function of its own here.
        image_size = None if kind.image_size is None else partial(kind.image_size, vae, transformer)
        if image_size is not None:
            image_size(size_step, size_step)
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
        head_dim=head_dim if type(head_dim) is int else None,
        token_grid=partial(kind.token_grid, vae, transformer),
        fixed_size=(card.height, card.width) if fixed else None,
        image_size=image_size,
        experts=2 if isinstance(second, list) and second[-1:] != [None] else 1,
    )


def configuration(name: str, component: str, source: str, card: ModelCard, index: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the VAE or a transformer, wherever it is.

    Args:
        name: what `--model` named.
        component: `vae`, `transformer` or `transformer_2`.
        source, card, index: the model's, as `Model` has them, and its index file.

    Raises:
        InputError: it cannot be had.
    """
    repository, file = card.transformer
    if component == "transformer" and card.parts and repository:
        return read_json(repository, file)
    if not PIPELINE_KINDS[card.pipeline].modular:
        return read_json(source, f"{component}/config.json", card.revision)
    try:
        part = listed_modular_parts(index, source).get(component)
    except InputError as error:
        raise InputError(f"--model {name}: {error}") from error
    if part is None:
        raise InputError(f"--model {name}: {MODULAR_INDEX} has no {component}")
    return read_json(part.repository, f"{part.subfolder}/config.json".lstrip("/"), part.revision)


def _known_pipeline(name: str, index: dict[str, Any], modular: bool) -> str:
    pipeline = index.get("_class_name")
    if isinstance(pipeline, str) and pipeline in IN_CODE_ONLY:
        raise InputError(f"--model {name}: it is a {pipeline}: {IN_CODE_ONLY[pipeline]}")
    kind = PIPELINE_KINDS.get(pipeline) if isinstance(pipeline, str) else None
    if not isinstance(pipeline, str) or kind is None or kind.modular != modular:
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
    nearest = plain if pipeline in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO) or not cards else cards[0]
    plain_settings: dict[str, Any] = {"flow_shift": None, "parts": (), "scheduler": (), "arguments": ()}
    plain_settings |= {"negative_prompt": "", "revision": revision}
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
