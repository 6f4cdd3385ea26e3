"""What a run ran on: versions of the libraries that matter, and the hardware."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from psa_diffusers import __version__

PACKAGES = ("torch", "diffusers", "transformers", "triton")


def versions() -> dict[str, str]:
    """Python and the packages that decide a video's pixels; a package that is not installed is left out."""
    found = {"psa-diffusers": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: str | None = None) -> dict[str, str | int | float]:
    """The machine: system, processor, cores, memory in GiB; with a torch device also its threads or its GPU."""
    found: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
    }
    memory = memory_gib()
    if memory is not None:
        found["memory_gib"] = memory
    if device is None:
        return found
    import torch

    found |= {"device": device, "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda or "none"
    return found


def device_name(device: str) -> str:
    """The name of a torch device's GPU; without one that is known, of the processor."""
    found = hardware(device)
    return str(found.get("gpu", found["processor"]))


def compiled_kernels_folder() -> str:
    """Where Triton keeps compiled kernels for later processes."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given:
        return given
    return str(Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache"))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """The machine's memory; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
