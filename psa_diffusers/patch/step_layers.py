"""The layers of a transformer at each step, as the preset's rules for steps change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from psa_diffusers.patch.list_cache import keeps_lists
from psa_diffusers.patch.sites import Layer
from psa_presets import Preset


class StepLayers:
    """The layers of one transformer, made once for all steps at which the same rules apply.

    Attributes:
        preset: of the transformer.
        plain: the layers by name, in order, where no rule for steps applies.

    Args:
        names: of all its layers, in order.

    Raises:
        PresetError: the preset names layers that the transformer lacks.
    """

    def __init__(self, preset: Preset, names: Sequence[str]) -> None:
        self.preset, self._names = preset, tuple(names)
        self._made: dict[tuple[int, ...], dict[str, Layer]] = {}
        self._last: tuple[tuple[int, int], Mapping[str, Layer]] | None = None
        self.plain = self._under(())

    def at(self, step: int, num_steps: int) -> Mapping[str, Layer]:
        """The layers by name, in order, at a step of a run; for an unknown run, `num_steps` 0, those of `plain`."""
        if not num_steps:
            return self.plain
        place, last = (step, num_steps), self._last
        if last is None or last[0] != place:
            # Read and written as a whole, for several threads may be at different steps.
            self._last = last = place, self._under(self.preset.step_rules_at(step, num_steps))
        return last[1]

    def _under(self, step_rules: tuple[int, ...]) -> Mapping[str, Layer]:
        if step_rules not in self._made:
            preset, count = self.preset, len(self._names)
            uncorrected = preset.layer_specs(count, step_rules, corrected=False)
            specs = preset.layer_specs(count, step_rules) if preset.correction else uncorrected
            rows = zip(self._names, specs, uncorrected, preset.layer_orders(count, step_rules), strict=True)
            self._made[step_rules] = {
                name: Layer(name, preset, spec, order, keeps_lists(preset), None if plain == spec else plain)
                for name, spec, plain, order in rows
            }
        return self._made[step_rules]
