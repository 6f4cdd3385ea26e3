"""Pyramid Sparse Attention for the video pipelines of Hugging Face diffusers, without training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not follow `__getattr__`
    from psa_diffusers.families import UnsupportedModelError as UnsupportedModelError
    from psa_diffusers.patch.apply import PSAHandle as PSAHandle
    from psa_diffusers.patch.apply import apply_psa as apply_psa
    from psa_diffusers.patch.dense_reasons import PSAFallbackError as PSAFallbackError
    from psa_diffusers.patch.dense_reasons import PSAFallbackWarning as PSAFallbackWarning
    from psa_diffusers.patch.parallel.plan import context_parallel_plan as context_parallel_plan
    from psa_diffusers.patch.patched import NotPatchedError as NotPatchedError
    from psa_diffusers.patch.patched import disable_psa as disable_psa
    from psa_diffusers.patch.patched import psa_stats as psa_stats
    from psa_diffusers.patch.processor import PSAProcessor as PSAProcessor
    from psa_diffusers.patch.stats import RunStats as RunStats
    from psa_diffusers.patch.token_order import token_permutation as token_permutation
    from psa_presets import Preset as Preset
    from psa_presets import PresetError as PresetError
    from psa_presets import list_presets as list_presets
    from psa_presets import load_preset as load_preset

__version__ = "0.1.0"

# In a checkout that is not installed, the operator's package lies beside this one instead of on the path.
_kernels = Path(__file__).resolve().parent.parent / "kernels"
if importlib.util.find_spec("psa_kernels") is None and (_kernels / "psa_kernels").is_dir():
    sys.path.append(str(_kernels))

# Imported when first used: the command line should not wait for PyTorch and diffusers to print its help.
_HOMES = {
    "NotPatchedError": ".patch.patched",
    "PSAFallbackError": ".patch.dense_reasons",
    "PSAFallbackWarning": ".patch.dense_reasons",
    "PSAHandle": ".patch.apply",
    "PSAProcessor": ".patch.processor",
    "Preset": "psa_presets",
    "PresetError": "psa_presets",
    "RunStats": ".patch.stats",
    "UnsupportedModelError": ".families",
    "apply_psa": ".patch.apply",
    "context_parallel_plan": ".patch.parallel.plan",
    "disable_psa": ".patch.patched",
    "list_presets": "psa_presets",
    "load_preset": "psa_presets",
    "psa_stats": ".patch.patched",
    "token_permutation": ".patch.token_order",
}

__all__ = [*_HOMES, "__version__"]


if not TYPE_CHECKING:  # type checkers would take every name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
