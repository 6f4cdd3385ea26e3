"""The pipeline runs of a calibration: measured, dense and sparse. Each is made once a device; its result is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from psa_diffusers.calibrate.measure import Figures, Measurement
from psa_diffusers.calibrate.plan import Calibration, Video
from psa_diffusers.calibrate.scaling import SCALES
from psa_diffusers.calibrate.store import Store
from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.environment import device_name
from psa_diffusers.patch.stats import RunStats
from psa_diffusers.runs.phases import settled
from psa_diffusers.runs.pipeline_call import Generated, generate_videos
from psa_presets import Preset

Presets = tuple[Preset, Preset | None]


class Runs:
    """Runs of one calibration. The pipeline is loaded for the first run whose result is not kept yet.

    Results are kept under the name of the GPU or processor that gave them, as the times and rounding of others differ.

    Args:
        tell: called with one line before each run.
    """

    def __init__(self, calibration: Calibration, store: Store, tell: Callable[[str], None]) -> None:
        self._plan, self._base, self._batch = calibration.plan, calibration.base, calibration.batch
        self._store, self._tell = store, tell
        self._pipe: Any = None
        self._count = 0

    def measure(self, videos: Sequence[Video], shapes: Mapping[str, Preset], steps: list[int]) -> list[Figures]:
        """Make the dense videos, and measure each shape in each layer; means over the videos made at once."""

        def run(batch: Sequence[Video]) -> list[Figures]:
            with Measurement(self._pipeline(), shapes, set(steps)) as measurement:
                results = self._make(batch, "measuring")
            figures = measurement.figures()
            self._keep_references(batch, results)
            return [figures] * len(batch)

        settings = {name: _settings(preset) for name, preset in shapes.items()}
        return self._once(videos, ("measure", settings, SCALES, steps), run)

    def dense(self, videos: Sequence[Video]) -> list[dict[str, Any]]:
        """Make the dense videos; for each, `step` is the mean seconds of a step, per video of those made at once."""

        def run(batch: Sequence[Video]) -> list[dict[str, Any]]:
            results = self._make(batch, "dense")
            self._keep_references(batch, results)
            return [{"step": _settled_step(result.seconds["per_step"], batch)} for result in results]

        return self._once(videos, ("dense",), run)

    def timed_dense(self, videos: Sequence[Video]) -> list[float]:
        """Mean seconds of a dense step, per video, from runs in which nothing is measured or patched."""

        def run(batch: Sequence[Video]) -> list[float]:
            results = self._make(batch, "timing dense")
            return [_settled_step(result.seconds["per_step"], batch) for result in results]

        return self._once(videos, ("timed",), run)

    def sparse(self, videos: Sequence[Video], presets: Presets, what: str) -> list[dict[str, Any]]:
        """Make sparse videos; for each, the PSNR in dB against the dense one (None if equal), `density`, and `step`.

        `step` is the mean time of a sparse step in seconds, None without one. It and the density are means over the
        videos made at once. The dense videos are those that `measure` or `dense` has kept.
        """

        def run(batch: Sequence[Video]) -> list[dict[str, Any]]:
            from psa_diffusers.patch.apply import apply_psa

            references = self._references(batch)
            with apply_psa(self._pipeline(), presets[0], preset_2=presets[1], strict=True) as psa:
                results = self._make(batch, what)
                stats = psa.stats()
            seconds = [results[0].seconds["per_step"][index] for index in stats.sparse_at]
            shared = {
                "density": self._density(stats),
                "step": _settled_step(seconds, batch) if seconds else None,
            }
            pairs = zip(references, results, strict=True)
            return [{"psnr": video_psnr(reference, result.frames), **shared} for reference, result in pairs]

        rules = [_settings(preset) for preset in presets if preset is not None]
        return self._once(videos, ("sparse", rules), run)

    def layers(self) -> dict[str, list[str]]:
        """Names of the self-attention layers of each transformer."""

        def look() -> dict[str, list[str]]:
            from psa_diffusers.families import find_family
            from psa_diffusers.patch.modules import find_transformers

            transformers = find_transformers(self._pipeline())
            prefix = {name: f"{name}." if len(transformers) > 1 else "" for name in transformers}
            return {
                name: [prefix[name] + layer for layer in find_family(part).self_attentions(part)]
                for name, part in transformers.items()
            }

        return self._store.once(("layers",), look)

    def _density(self, stats: RunStats) -> float:
        """Mean density of the layers that the base preset has sparse, at its sparse steps."""
        counted = [spec is not None for spec in self._base.layer_specs(self._plan.model.num_layers)]
        counted *= self._plan.model.experts
        values = [
            value
            for row in stats.density[stats.dense_steps : stats.steps - stats.dense_last]
            for value, counts in zip(row, counted, strict=True)
            if counts and value is not None
        ]
        return sum(values) / len(values)

    def _pipeline(self) -> Any:
        if self._pipe is None:
            settings = self._plan.settings
            self._pipe = load_pipeline(
                self._plan.model,
                dtype=settings.dtype,
                device=settings.device,
                offload=settings.offload,
                flow_shift=settings.flow_shift,
                loras=self._plan.loras,
            )
        return self._pipe

    def _once(self, videos: Sequence[Video], name: tuple[Any, ...], run: Callable[[Sequence[Video]], list]) -> list:
        """What is kept for each video, or else what `run` gives for as many at once as is wanted."""
        found = []
        for first in range(0, len(videos), self._batch):
            batch = videos[first : first + self._batch]
            kept = (*name, self._device, [[*video] for video in batch])
            found += self._store.once(kept, partial(run, batch))
        return found

    def _make(self, batch: Sequence[Video], what: str) -> list[Generated]:
        self._count += 1
        prompt = batch[0].prompt
        several = f"{len(batch)} prompts, " if len(batch) > 1 else ""
        self._tell(f"run {self._count}: {what}: {several}{prompt if len(prompt) <= 60 else prompt[:57] + '...'}")
        prompts, seeds = [video.prompt for video in batch], [video.seed for video in batch]
        return generate_videos(self._pipeline(), self._plan, prompts, what, seeds)

    def _keep_references(self, batch: Sequence[Video], results: Sequence[Generated]) -> None:
        for video, result in zip(batch, results, strict=True):
            self._store.keep_frames(self._reference(video), result.frames)

    def _references(self, batch: Sequence[Video]) -> list[np.ndarray]:
        """The dense videos of a batch, which are made again if the file of one is gone or damaged."""
        found = self._kept_references(batch)
        if any(frames is None for frames in found):
            self._keep_references(batch, self._make(batch, "dense, again"))
            found = self._kept_references(batch)
        return [frames for frames in found if frames is not None]

    def _kept_references(self, batch: Sequence[Video]) -> list[np.ndarray | None]:
        return [self._store.frames(self._reference(video)) for video in batch]

    def _reference(self, video: Video) -> tuple[Any, ...]:
        return ("reference", self._device, *video)

    @cached_property
    def _device(self) -> str:
        return device_name(self._plan.settings.device)


def _settled_step(seconds: Sequence[float], batch: Sequence[Video]) -> float:
    """Mean seconds of steps of one kind, per video, without what the first one took to compile kernels."""
    return settled(seconds) / len(seconds) / len(batch)


def _settings(preset: Preset) -> dict[str, Any]:
    return preset.model_dump(mode="json", exclude={"name", "source"})


def video_psnr(reference: np.ndarray, other: np.ndarray) -> float | None:
    """PSNR in dB, mean over the frames that differ; None if none does.

    Args:
        reference: uint8 [frames, height, width, 3], which limits the figure to about 59 dB.
        other: the same shape, uint8 or float in [0, 1].
    """
    from skimage.metrics import peak_signal_noise_ratio

    values = []
    for first, second in zip(reference, other, strict=True):
        second = second / 255 if second.dtype == np.uint8 else second
        first = first / 255
        if not np.array_equal(first, second):
            values.append(peak_signal_noise_ratio(first, second.astype(first.dtype), data_range=1.0))
    return float(np.mean(values)) if values else None
