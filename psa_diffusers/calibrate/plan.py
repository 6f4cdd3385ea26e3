"""The plan of a calibration, and the checks before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from psa_diffusers.calibrate.intervals import FEWEST
from psa_diffusers.calibrate.result import is_own
from psa_diffusers.calibrate.targets import Target
from psa_diffusers.errors import InputError
from psa_diffusers.files import check_name, check_output, partial_path
from psa_diffusers.runs.plan import Plan
from psa_presets import Preset, PresetError


class Video(NamedTuple):
    """A prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Calibration:
    """What to do, checked.

    Attributes:
        plan: model, size and steps; its preset is the base preset, its prompts are those to measure on.
        held_out: prompts to verify on.
        batch: how many videos are made at once.
        target: what the preset should reach.
        measured_steps: at how many denoising steps to measure.
        output: the YAML file to write; the file of a second expert has "-2" at the end of its name.
    """

    plan: Plan
    held_out: tuple[str, ...]
    target: Target
    measured_steps: int
    output: Path
    overwrite: bool
    batch: int = 1

    @property
    def base(self) -> Preset:
        """The base preset.

        Raises:
            InputError: there is none: the plan is dense.
        """
        if self.plan.preset is None:
            raise InputError("--base-preset dense: has no shape to compare; give a sparse preset")
        return self.plan.preset

    @property
    def sparse_steps(self) -> tuple[int, ...]:
        """The denoising steps, counted from 0, that the base preset does not keep dense; they follow each other."""
        return self.base.sparse_steps(self.plan.steps)

    @property
    def dense_steps(self) -> int:
        """How many denoising steps the base preset keeps dense, at the beginning and at the end."""
        return self.plan.steps - len(self.sparse_steps)

    @property
    def measured(self) -> list[Video]:
        """The videos to measure on. Each video of the calibration has its own noise."""
        return [Video(prompt, self.plan.settings.seed + index) for index, prompt in enumerate(self.plan.prompts)]

    @property
    def verified(self) -> list[Video]:
        """The videos to verify on."""
        first = self.plan.settings.seed + len(self.plan.prompts)
        return [Video(prompt, first + index) for index, prompt in enumerate(self.held_out)]

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The file of each expert."""
        second = self.output.with_name(f"{self.output.stem}-2{self.output.suffix}")
        return (self.output, second)[: self.plan.model.experts]

    @property
    def folder(self) -> Path:
        """Where the measurements are kept."""
        return self.output.with_suffix(".calibration")


def check(calibration: Calibration) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        InputError: no sparse layer or step, rules for steps, a name that no preset may have, a file is in the way, or
            the output cannot be written.
    """
    plan, base = calibration.plan, calibration.base
    if calibration.batch > 1 and plan.image is not None:
        raise InputError(f"--batch {calibration.batch}: with --image videos are made one at a time")
    if calibration.output.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"--output {calibration.output}: must end in .yaml")
    for path in calibration.outputs:
        check_name("--output", path, partial_path(path))
        try:
            Preset(name=path.stem)
        except PresetError as error:
            raise InputError(f"--output {path}: {error.problem}") from error
        if path.is_dir():
            raise InputError(f"--output {path}: it is a folder; name the YAML file to write")
        if path.exists() and not calibration.overwrite and not is_own(path):
            raise InputError(f"--output {path}: is already there; choose another name or add --overwrite")
    if base.steps:
        raise InputError(
            f"--base-preset {base.name}: has rules for steps, and one setting of a layer is measured for all of them; "
            "give a preset without such rules"
        )
    if not calibration.sparse_steps:
        raise InputError(f"--steps {plan.settings.steps}: with {base.name} all of them are dense")
    if not any(base.layer_specs(plan.model.num_layers)):
        raise InputError(f"--base-preset {base.name}: keeps every layer dense")
    if len(plan.prompts) < FEWEST:
        raise InputError(
            f"--prompts: {len(plan.prompts)} different prompts to measure on are too few to tell a gain from chance; "
            f"needed: {FEWEST} or more, beside those to verify on"
        )
    both = sorted(set(plan.prompts) & set(calibration.held_out))
    if both:
        raise InputError(f"--verify: the prompt {both[0]!r} is also measured on; verify on others")
    check_output(calibration.output, calibration.output.parent)
