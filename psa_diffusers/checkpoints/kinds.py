"""The pipeline classes of every family: those that `--model` takes, and those that only code can run."""

from psa_diffusers.families import MODULES
from psa_diffusers.families.pipeline_kind import PipelineKind

__all__ = ["IN_CODE_ONLY", "PIPELINE_KINDS", "PipelineKind"]

_ALL: dict[str, PipelineKind] = {
    name: kind for module in MODULES for name, kind in getattr(module, "PIPELINES", {}).items()
}

PIPELINE_KINDS = {name: kind for name, kind in _ALL.items() if kind.in_code_only is None}

# Pipelines of supported models that the commands cannot run, and why.
IN_CODE_ONLY = {name: kind.in_code_only for name, kind in _ALL.items() if kind.in_code_only is not None}
