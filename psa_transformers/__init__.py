"""Pyramid Sparse Attention for the language and vision-language models of Hugging Face transformers, without training.

    with psa_transformers.apply_psa(model, "psa-auto") as psa:
        model.generate(**inputs)
    psa.stats()

`apply_psa` says what is served. This package knows nothing of diffusers.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not follow `__getattr__`
    from psa_presets import Preset as Preset
    from psa_presets import PresetError as PresetError
    from psa_presets import list_presets as list_presets
    from psa_presets import load_preset as load_preset
    from psa_transformers.apply import PSAHandle as PSAHandle
    from psa_transformers.apply import apply_psa as apply_psa
    from psa_transformers.fallbacks import PSAFallbackError as PSAFallbackError
    from psa_transformers.fallbacks import PSAFallbackWarning as PSAFallbackWarning
    from psa_transformers.stats import PrefillStats as PrefillStats

# In a checkout that is not installed, the operator's package lies beside this one instead of on the path.
_kernels = Path(__file__).resolve().parent.parent / "kernels"
if importlib.util.find_spec("psa_kernels") is None and (_kernels / "psa_kernels").is_dir():
    sys.path.append(str(_kernels))

# Imported when first used, as PyTorch and transformers take seconds.
_HOMES = {
    "PSAFallbackError": ".fallbacks",
    "PSAFallbackWarning": ".fallbacks",
    "PSAHandle": ".apply",
    "Preset": "psa_presets",
    "PresetError": "psa_presets",
    "PrefillStats": ".stats",
    "apply_psa": ".apply",
    "list_presets": "psa_presets",
    "load_preset": "psa_presets",
}

__all__ = list(_HOMES)


if not TYPE_CHECKING:  # type checkers would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
