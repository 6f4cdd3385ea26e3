"""What a run is asked to do, checked in full before any weights load."""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.checkpoints.digest import folder_digest
from psa_diffusers.checkpoints.lora import Lora, resolve_loras
from psa_diffusers.checkpoints.resolve import Model, resolve_model
from psa_diffusers.errors import InputError
from psa_diffusers.families.card import ModelCard
from psa_diffusers.runs.compiled import missing_compiler
from psa_diffusers.runs.prompts import only_words, read_prompts, slug
from psa_diffusers.runs.request import Request, given, in_range, one_of
from psa_diffusers.runs.vbench import check_names
from psa_diffusers.runs.video_options import (
    fit_image,
    fits_in_memory,
    frame_count,
    frame_rate,
    load_image,
    step_count,
    video_size,
)

if TYPE_CHECKING:
    from PIL import Image

    from psa_presets import Preset

DENSE = "dense"
DTYPES = ("auto", "bfloat16", "float16", "float32")
OFFLOADS = ("none", "model", "group")


@dataclass(frozen=True)
class Settings:
    """Everything that a video depends on besides its prompt; two runs with equal settings may share a folder.

    `preset_rules` is the whole preset (None for dense), and `preset_2_rules` the second transformer's preset if it has
    its own; both are scaled to `density` if one was asked for. Their dumps differ exactly if the presets do.
    `source_digest` is the `folder_digest` of a model that is the user's own folder, else None.
    `image_digest` is the first half of the image file's SHA-256. The videos of a prompt (`samples`) have the seeds
    `seed`, `seed + 1`, ... `loras` has the `Lora.settings` of each LoRA, in order, and `arguments` what the model's
    card adds to the pipeline's call.
    """

    model: str
    source: str
    source_digest: str | None
    pipeline: str
    preset: str
    preset_rules: dict[str, Any] | None
    preset_2_rules: dict[str, Any] | None
    density: float | None
    compare: bool
    seed: int
    samples: int
    steps: int
    guidance: float
    guidance_2: float | None
    flow_shift: float | None
    height: int
    width: int
    frames: int
    fps: int
    negative_prompt: str
    dtype: str
    device: str
    offload: str
    compile: bool
    cuda_graphs: bool
    image: str | None
    image_digest: str | None
    strict: bool
    loras: list[dict[str, Any]]
    arguments: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values. Keys that earlier versions did not have are left out if they are empty."""
        later = ("loras", "arguments", "density", "source_digest", "cuda_graphs")
        return {name: value for name, value in asdict(self).items() if value or name not in later}


@dataclass(frozen=True)
class Plan:
    """A checked run: every choice is made.

    `preset` is None for a dense run. `prompts` repeats each prompt once for each of its samples. `seconds` is how long
    it took to make the plan, which is mostly the import of PyTorch.
    """

    settings: Settings
    model: Model
    preset: "Preset | None"
    prompts: tuple[str, ...]
    output: Path
    overwrite: bool
    image: "Image.Image | None"
    vbench: bool = False
    preset_2: "Preset | None" = None
    loras: tuple[Lora, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def sample(self, index: int) -> int:
        """The sample number, counted from 0, of the video at an index of `prompts`."""
        return index % self.settings.samples

    @property
    def steps(self) -> int:
        """How many denoising steps call a transformer."""
        return self.settings.steps - self.model.kind.idle_steps

    @property
    def name(self) -> str:
        """The stem of the video's file: "dense", or the preset's name, which is always usable as a file name."""
        return self.settings.preset


def make_plan(request: Request) -> Plan:
    """Check a request and fill in the model's defaults; load no weights.

    Raises:
        InputError: the first thing that is wrong, in one line.
    """
    started = time.perf_counter()
    plan = _checked(request)
    return replace(plan, seconds=time.perf_counter() - started)


def _checked(request: Request) -> Plan:
    prompts = _prompts(request)
    one_of("--dtype", request.dtype, DTYPES)
    one_of("--offload", request.offload, OFFLOADS)
    if request.compile and request.offload == "group":
        raise InputError("--compile: needs blocks that stay whole; use --offload none or model")
    if request.compare and request.preset == DENSE:
        raise InputError("--compare needs a sparse --preset; dense is what it is compared with")
    samples = in_range("--samples", request.samples, 1, 1000)
    if request.vbench:
        check_names(prompts, samples)
    density = _check_density(request)
    preset = _load_preset("--preset", request.preset, density)
    preset_2 = None if request.preset_2 is None else _load_preset("--preset-2", request.preset_2, density)
    device = _pick_device(request.device, request.offload)
    if request.compile and (compiler := missing_compiler(device)) is not None:
        raise InputError(
            f"--compile: calls {compiler} on a CPU, which is not there; install it, or name another in CXX"
        )
    model = resolve_model(request.model)
    card = model.card
    if preset is not None:
        _fits_model("--preset", preset, model)
    if request.preset_2 is not None:
        if model.experts != 2 or preset is None or preset_2 is None:
            raise InputError(f"--preset-2 {request.preset_2}: needs a model with two transformers and sparse presets")
        _fits_model("--preset-2", preset_2, model)
    _check_guided(request, model)
    preset, preset_2 = (_of_card(card, each) for each in (preset, preset_2))
    image, digest = load_image(request.image, model, required=not request.check)
    height, width = video_size(request, model, image)
    frames = frame_count(given(request.frames, card.frames), model)
    if not request.check:
        fits_in_memory(height, width, frames)
    work = model.dense_work(frames, height, width, with_image=image is not None)
    given_loras = ((), ()) if request.check else (request.lora, request.lora_2)
    loras = resolve_loras(*given_loras, model=model.name, pipeline=card.pipeline, experts=model.experts)
    negative = request.negative_prompt
    bundled = model.name in MODELS and card.hub_id is None
    settings = Settings(
        model=request.model,
        source="bundled" if bundled else model.source,
        source_digest=None if bundled else folder_digest(model),
        pipeline=card.pipeline,
        preset=DENSE if preset is None else preset.name,
        preset_rules=None if preset is None else preset.model_dump(mode="json"),
        preset_2_rules=None if preset_2 is None else preset_2.model_dump(mode="json"),
        density=density,
        compare=request.compare,
        seed=in_range("--seed", request.seed, 0, 2**63 - 1),
        samples=samples,
        steps=step_count(request.steps, model),
        guidance=in_range("--guidance", given(request.guidance, card.guidance), 0.0, 100.0),
        guidance_2=card.guidance_2 if request.guidance is None and model.experts == 2 else None,
        flow_shift=card.flow_shift,
        height=height,
        width=width,
        frames=frames,
        fps=frame_rate(request.fps, model),
        negative_prompt=card.negative_prompt if negative is None else only_words("--negative-prompt", negative),
        dtype=_pick_dtype(request.dtype, device, card.dtype),
        device=device,
        offload=request.offload,
        compile=request.compile,
        cuda_graphs=_cuda_graphs(request, device, (preset, preset_2), work),
        image=request.image,
        image_digest=digest,
        strict=request.strict,
        loras=[lora.settings() for lora in loras],
        arguments=dict(card.arguments),
    )
    if image is not None and model.kind.begins_with_image and model.image_size is None:
        image = fit_image(image, height, width)
    output = Path(request.output) if request.output else default_output(settings, prompts)
    repeated = tuple(prompt for prompt in prompts for _ in range(samples))
    return Plan(settings, model, preset, repeated, output, request.overwrite, image, request.vbench, preset_2, loras)


def default_output(settings: Settings, prompts: tuple[str, ...]) -> Path:
    """A separate folder for every combination of settings and prompts, so that the same command finds its results."""
    digest = hashlib.sha256(repr((sorted(settings.to_dict().items()), prompts)).encode()).hexdigest()[:6]
    return Path("psa-output", f"{slug(settings.model)}-{slug(settings.preset)}-{slug(prompts[0], 24)}-{digest}")


def _prompts(request: Request) -> tuple[str, ...]:
    if request.check and not request.prompts:
        return ("no prompt",)
    return request.prompts if request.literal else read_prompts(request.prompts)


def _check_density(request: Request) -> float | None:
    if request.density is None:
        return None
    if not 0 < request.density <= 1:  # also true for NaN
        raise InputError(f"--density {request.density:g}: must be above 0 and up to 1, a share of dense attention")
    if request.preset == DENSE:
        raise InputError(f"--density {request.density:g}: needs a sparse --preset, and it is dense")
    return float(request.density)


def _load_preset(option: str, name: str | None, density: float | None) -> "Preset | None":
    if name == DENSE:
        return None
    from psa_presets import PresetError, choose_preset

    try:
        return choose_preset(name, density)
    except PresetError as error:
        also = "" if density is None else f"--density {density:g} with "
        raise InputError(f"{also}{option} {error.at(str(name))}") from error


def _of_card(card: ModelCard, preset: "Preset | None") -> "Preset | None":
    """The preset with what the model's card says where the preset says `auto`."""
    if preset is None or card.min_tokens is None or preset.min_tokens != "auto":
        return preset
    return preset.replace(min_tokens=card.min_tokens)


def _fits_model(option: str, preset: "Preset", model: Model) -> None:
    try:
        preset.layer_specs(model.num_layers)
    except ValueError as error:
        raise InputError(f"{option} {error}") from error


def _check_guided(request: Request, model: Model) -> None:
    given = {"--guidance": request.guidance, "--negative-prompt": request.negative_prompt}
    for option, value in given.items():
        if value is not None and not model.kind.guided:
            raise InputError(f"{option} {value}: {model.name} takes none; guidance is in its weights")


def _pick_device(device: str, offload: str) -> str:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: not a device; use auto, cpu, cuda, cuda:N or mps") from error
    if kind.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (kind.index or 0) >= count:
            raise InputError(f"--device {device}: this machine has {count} CUDA devices")
    elif kind.type == "mps":
        if not torch.backends.mps.is_available():
            raise InputError(f"--device {device}: Apple's GPU is not available here")
    elif kind.type != "cpu":
        raise InputError(f"--device {device}: not supported; use auto, cpu, cuda, cuda:N or mps")
    if offload != "none" and kind.type != "cuda":
        raise InputError(f"--offload {offload}: needs a CUDA device, and the run is on {device}; use --offload none")
    return device


def _cuda_graphs(request: Request, device: str, presets: "Iterable[Preset | None]", work: int | None) -> bool:
    """Whether forwards are replayed as CUDA graphs: by default where they can, and attention is little work."""
    from psa_diffusers.patch.served_calls import GAINS_FROM

    if (wanted := request.cuda_graphs) is False:
        return False
    obstacle = _why_no_graphs(device, request.offload, presets)
    if wanted and obstacle is not None:
        raise InputError(f"--cuda-graphs: {obstacle}")
    return obstacle is None and (wanted is True or (work is not None and work < GAINS_FROM))


def _why_no_graphs(device: str, offload: str, presets: "Iterable[Preset | None]") -> str | None:
    """Why no forward, or no sparse one, could be a CUDA graph; None if they can."""
    from psa_diffusers.patch.replays import kept_key

    if not device.startswith("cuda"):
        return f"needs a CUDA device, and the run is on {device}"
    if offload != "none":
        return "needs weights that stay on the GPU; use --offload none"
    for preset in presets:
        if preset is None:
            continue
        key = kept_key(preset) or ("dense_attention" if preset.dense_attention == "psa" else None)
        if key is not None:
            return f"{preset.name} has {key}, which leaves something for later forwards; a replay cannot"
    return None


def _pick_dtype(dtype: str, device: str, trained: str) -> str:
    if dtype == "auto":
        return "float32" if device == "cpu" else trained
    return dtype
