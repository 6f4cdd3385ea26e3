"""The pipeline runs of a calibration: measured, dense and sparse; each is made once and then kept."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from psa_diffusers.calibrate.capture import Figures, MeasuringProcessor
from psa_diffusers.calibrate.store import Store
from psa_diffusers.generate import generate_video
from psa_diffusers.pipelines import load_pipeline
from psa_diffusers.presets import Preset
from psa_diffusers.settings import Plan
from psa_diffusers.statistics import RunStats

Presets = tuple[Preset, Preset | None]


class Runs:
    """Runs of one plan, whose preset is the base preset; the pipeline loads with the first that is not kept yet.

    Args:
        tell: called with one line before each run.
    """

    def __init__(self, plan: Plan, store: Store, tell: Callable[[str], None]) -> None:
        self._plan, self._store, self._tell = plan, store, tell
        self._pipe: Any = None
        self._count = 0

    def measure(self, prompt: str, steps: list[int]) -> Figures:
        """What sparse attention would do in each layer on the way to the dense video of a prompt."""

        def run() -> Figures:
            processor = MeasuringProcessor(self._pipeline(), self._plan.preset, set(steps))
            processor.install()
            try:
                result = self._video(prompt, "measuring")
                figures = processor.figures()
            finally:
                processor.restore()
            self._store.keep_frames(("reference", prompt), result.frames)
            return figures

        return self._store.once(("measure", prompt, steps), run)

    def dense(self, prompt: str) -> dict[str, Any]:
        """Makes the dense video of a prompt: `step`, the median seconds of a step."""

        def run() -> dict[str, Any]:
            result = self._video(prompt, "dense")
            self._store.keep_frames(("reference", prompt), result.frames)
            return {"step": result.seconds["median_step"]}

        return self._store.once(("dense", prompt), run)

    def timed_dense(self, prompt: str) -> float:
        """Median seconds of a dense step, from a run in which nothing is measured or patched."""
        return self._store.once(("timed", prompt), lambda: self._video(prompt, "timing dense").seconds["median_step"])

    def sparse(self, prompt: str, presets: Presets, what: str) -> dict[str, Any]:
        """PSNR in dB against the dense video (None if equal), `density`, and `step`: seconds of a sparse step, median.

        The prompt's dense video must have been made, by `measure` or `dense`.
        """

        def run() -> dict[str, Any]:
            from psa_diffusers import apply_psa

            with apply_psa(self._pipeline(), presets[0], preset_2=presets[1], strict=True) as psa:
                result = self._video(prompt, what)
                stats = psa.stats()
            rows = enumerate(stats.density)
            sparse = [index for index, row in rows if any(value is not None and value < 1 for value in row)]
            seconds = [result.seconds["per_step"][index] for index in sparse]
            reference = self._store.frames(("reference", prompt))
            if reference is None:
                raise FileNotFoundError(
                    f"{self._store.path}: the dense video of {prompt!r} is missing; add --overwrite"
                )
            return {
                "psnr": mean_psnr(reference, result.frames),
                "density": self._density(stats),
                "step": median(seconds) if seconds else None,
            }

        rules = [preset.model_dump(mode="json", exclude={"name", "source"}) for preset in presets if preset is not None]
        return self._store.once(("sparse", prompt, rules), run)

    def layers(self) -> dict[str, list[str]]:
        """Names of the self-attention layers of each transformer."""

        def look() -> dict[str, list[str]]:
            from psa_diffusers.attention_modules import find_transformers
            from psa_diffusers.models import find_family

            transformers = find_transformers(self._pipeline())
            prefix = {name: f"{name}." if len(transformers) > 1 else "" for name in transformers}
            return {
                name: [prefix[name] + layer for layer in find_family(part).self_attentions(part)]
                for name, part in transformers.items()
            }

        return self._store.once(("layers",), look)

    def _density(self, stats: RunStats) -> float:
        """Mean density of the layers that the base preset has sparse, at its sparse steps."""
        counted = [spec is not None for spec in self._plan.preset.layer_specs(self._plan.model.num_layers)]
        counted *= self._plan.model.experts
        values = [
            value
            for row in stats.density[stats.dense_steps :]
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
            )
        return self._pipe

    def _video(self, prompt: str, what: str) -> Any:
        self._count += 1
        self._tell(f"run {self._count}: {what}: {prompt if len(prompt) <= 60 else prompt[:57] + '...'}")
        return generate_video(self._pipeline(), self._plan, prompt, what, self._plan.settings.seed)


def mean_psnr(reference: np.ndarray, other: np.ndarray) -> float | None:
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
