"""LoRA: what `--lora` names, checked before any weights load, and loaded into a pipeline."""

from __future__ import annotations

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_diffusers.checkpoints.components import check_values, one_line, some
from psa_diffusers.checkpoints.hub import hub_file, hub_files
from psa_diffusers.errors import InputError

ENDING = ".safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"  # as `save_lora_weights` names a file
HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<file>.+\.safetensors))?")
# The two factors, as diffusers and peft, kohya's scripts, and diffusers once named them.
FACTORS = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up"))
KRONECKER = ".lokr_"  # factors of another kind, which newer versions of diffusers load
MAGNITUDES = "dora_scale"  # of DoRA, which diffusers leaves out
TRANSFORMER, SECOND = "transformer", "transformer_2"


@dataclass(frozen=True)
class Lora:
    """One LoRA of a run.

    Attributes:
        given: what names it, without the weight.
        file: an absolute path.
        weight: what its change of the weights is multiplied with.
        digest: the first half of the file's SHA-256.
        name: the adapter's, which no other has.
        into: the transformers that it changes.
    """

    given: str
    file: Path
    weight: float
    digest: str
    name: str
    into: tuple[str, ...] = (TRANSFORMER,)

    def settings(self) -> dict[str, Any]:
        """What a video depends on, as JSON values."""
        return {"lora": self.given, "weight": self.weight, "digest": self.digest, "into": list(self.into)}


def resolve_loras(
    first: Iterable[str], second: Iterable[str], *, model: str, pipeline: str, experts: int
) -> tuple[Lora, ...]:
    """Find and check the LoRA files of `--lora` and `--lora-2`; those of the hub are downloaded.

    Args:
        first: of both transformers where there are two, or of the first alone if there are others for the second.
        model: its name.
        pipeline: its pipeline's class in diffusers.
        experts: how many transformers it has.

    Raises:
        InputError: the first that cannot be used with the model, with its reason.
    """
    first, second = list(first), list(second)
    if not first and not second:
        return ()
    given = [("--lora", text) for text in first] + [("--lora-2", text) for text in second]
    _check_pipeline(f"{given[0][0]} {given[0][1]}", model, pipeline)
    if second and experts != 2:
        raise InputError(f"--lora-2 {second[0]}: needs a model with two transformers")
    both = (TRANSFORMER, SECOND) if experts == 2 and not second else (TRANSFORMER,)
    loras: list[Lora] = []
    for option, text in given:
        lora = _resolve(option, text, len(loras) + 1, (SECOND,) if option == "--lora-2" else both)
        for other in loras:
            if (other.digest, other.into) == (lora.digest, lora.into):
                raise InputError(f"{option} {text}: is the same file as {other.given}; give it once")
        loras.append(lora)
    return tuple(loras)


def load_loras(pipe: Any, loras: Sequence[Lora]) -> list[str]:
    """Load them into a pipeline, each with its weight; return a line about each that does not fit in part.

    Raises:
        InputError: one does not fit at all, or cannot be loaded.
    """
    told, weights = [], {lora.name: lora.weight for lora in loras}
    with _quiet():
        for lora in loras:
            for part in lora.into:
                told += _load(pipe, lora, part)
        # Set for each component by itself: the pipeline's own way wants every LoRA in every component.
        for component, names in _adapters(pipe).items():
            getattr(pipe, component).set_adapters(names, [weights[name] for name in names])
    return list(dict.fromkeys(told))


def _resolve(option: str, text: str, number: int, into: tuple[str, ...]) -> Lora:
    given, weight = _weight(option, text)
    shown = f"{option} {text}"
    file = _find(shown, given)
    _check_header(shown, file)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:32]
    # peft takes no dots in a name, and none that its own words begin with.
    stem = re.sub(r"\W+", "_", file.stem, flags=re.ASCII)
    return Lora(given, file, weight, digest, f"{stem}_{number}", into)


def _weight(option: str, text: str) -> tuple[str, float]:
    """What a text names, and the weight after its last colon, or 1."""
    given, colon, number = text.rpartition(":")
    if not colon or os.path.exists(text):
        given, number = text, "1"
    if not given.strip():
        raise InputError(f"{option} {text}: names nothing; give PATH or HUB_ID, and perhaps :WEIGHT")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"{option} {text}: the weight {number!r} after the colon must be a number, such as 0.8")
    return given, weight


def _find(shown: str, given: str) -> Path:
    path = Path(given).expanduser()
    if os.path.isdir(path):  # also for a name that is too long, where Path.is_dir raises
        files = sorted(file.name for file in path.glob(f"*{ENDING}"))
        return (path / _one_of(shown, files, given)).absolute()
    if os.path.exists(path):
        if path.suffix != ENDING:
            raise InputError(f"{shown}: must end in {ENDING}; weights of other formats are not loaded")
        return path.absolute()
    found = None if given.startswith((".", "/", "~")) else HUB_ID.fullmatch(given)
    if found is None or (found["file"] is None and given.endswith(ENDING)):
        raise InputError(f"{shown}: no such file, and no hub id (owner/name or owner/name/file{ENDING})")
    repository, file = found["repository"], found["file"]
    if file is None:
        files = [name for name in hub_files(shown, "LoRA", repository, ENDING) if "/" not in name]
        file = _one_of(shown, files, given)
    return hub_file(shown, "LoRA", repository, file, f"{repository} has no {file}").absolute()


def _one_of(shown: str, files: list[str], where: str) -> str:
    """The LoRA among the safetensors files of a folder or repository."""
    if DIFFUSERS_NAME in files:
        return DIFFUSERS_NAME
    if len(files) != 1:
        several = f"several {ENDING} files; name one of them: {', '.join(files)}" if files else f"no {ENDING} file"
        raise InputError(f"{shown}: {where} holds {several}")
    return files[0]


def _check_header(shown: str, file: Path) -> None:
    keys = _keys(shown, file)
    swaps = [(old, new) for pair in FACTORS for old, new in (pair, pair[::-1])]
    weights = [key for key in keys if not key.endswith("bias")]  # which the second factor alone may have
    pairs = [(key, key.replace(old, new)) for key in weights for old, new in swaps if old in key]
    if not pairs and not any(KRONECKER in key for key in keys):
        example = f", but {some(sorted(keys))}" if keys else ""
        raise InputError(f"{shown}: holds no LoRA weights (lora_A and lora_B, or lora_down and lora_up){example}")
    lone = sorted(key for key, other in pairs if other not in keys)
    if lone:
        raise InputError(f"{shown}: the file is not complete: the other factor of {some(lone)} is missing")


def _keys(shown: str, file: Path) -> set[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{shown}: cannot be read as a {ENDING} file ({one_line(error)})") from error


def _check_pipeline(shown: str, model: str, pipeline: str) -> None:
    import diffusers

    if not hasattr(getattr(diffusers, pipeline, None), "load_lora_weights"):
        installed = f"diffusers {diffusers.__version__}"
        raise InputError(f"{shown}: {model} takes no LoRA: {pipeline} of {installed} has no load_lora_weights")


def _load(pipe: Any, lora: Lora, part: str) -> list[str]:
    """Load one into one transformer."""
    shown = f"--lora {lora.given}"
    where = {"load_into_transformer_2": True} if part == SECOND else {}
    try:
        state = pipe.lora_state_dict(str(lora.file))
        pipe.load_lora_weights(str(lora.file), adapter_name=lora.name, **where)
    except Exception as error:  # peft and diffusers raise many kinds for weights that do not fit
        raise InputError(f"{shown}: does not fit the model: {one_line(error)}") from error
    loaded = _adapter_keys(pipe, lora.name)
    wanted = [_plain(key) for key in (state[0] if isinstance(state, tuple) else state)]
    if not loaded:
        raise InputError(f"{shown}: does not fit the model: it has no place for {some(sorted(wanted))} of its weights")
    check_values(shown, getattr(pipe, part))
    told = []
    # Only the newest names can be compared: the others change when they are loaded.
    unused = sorted(key for key in wanted if any(factor in key for factor in FACTORS[0]) and key not in loaded)
    if unused:
        told.append(f"{shown}: {len(unused)} of its {len(wanted)} weights have no place in the model: {some(unused)}")
    if any(MAGNITUDES in key for key in _keys(shown, lora.file)):
        told.append(f"{shown}: is a DoRA, whose magnitudes diffusers ignores; its effect will differ")
    return told


def _adapter_keys(pipe: Any, adapter: str) -> set[str]:
    """The weights of an adapter in whatever components have it, by the names that files have after the component's."""
    return {
        name.replace(f".{adapter}.", ".")
        for component, adapters in _adapters(pipe).items()
        if adapter in adapters
        for name, _ in getattr(pipe, component).named_parameters()
        if f".{adapter}." in name
    }


def _adapters(pipe: Any) -> dict[str, list[str]]:
    """The adapters that each component of a pipeline has."""
    return {component: list(names) for component, names in pipe.get_list_adapters().items() if names}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers and peft from saying at length what is told in one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _plain(key: str) -> str:
    """A weight's name without the component that it is of."""
    return key.split(".", 1)[-1]
