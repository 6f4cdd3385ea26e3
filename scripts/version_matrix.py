"""Run the tests with the oldest and the newest versions of what the package needs, each in an environment.

`oldest` has the oldest diffusers and transformers that pyproject.toml names, and the PyTorch and Triton of development.
`compiler` has the oldest PyTorch whose compiler makes one graph for all blocks of a kind, for the tests of compiled
blocks. `newest` has the newest of everything, PyTorch and Triton too, and compiles the kernels as well.

    python scripts/version_matrix.py --folder /tmp/versions
    python scripts/version_matrix.py --folder /tmp/versions --rows oldest -- -x tests/patch/test_processor.py

What follows `--` goes to pytest; by default the tests that run pipelines. An environment that is there already is used
again. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Packages whose oldest supported version the row `oldest` takes; of the others pip takes what fits these.
PINNED = ("diffusers", "transformers")
SHOWN = ("torch", "triton", "diffusers", "transformers", "accelerate", "huggingface_hub", "peft", "numpy")
TESTS = [
    *("test_processor", "test_experts", "test_fallbacks", "test_families", "test_lookup"),
    *("test_stock_processors", "test_text", "test_changed_pipelines"),
    *("test_compiled", "test_finite_guard", "test_beside_caches", "test_beside_others"),
    *("test_pipelines", "test_generate", "test_run_folder", "test_pipeline_call", "test_demo"),
    *("test_parallel", "test_exchange", "test_memory", "test_security"),
    *("test_calibrate", "test_calibrate_decisions", "test_calibrate_measure", "test_calibrate_mistakes"),
]
# What a newer compiler may change without a GPU to show it. `make test` runs these with the version of development.
COMPILED = [
    *("test_triton_compile", "test_budget_compile", "test_causal_compile", "test_triton_int8_compile"),
    *("test_hopper_compile", "test_self_test"),
]

GRAPHS = ["test_compiled", "test_compiled_blocks", "test_finite_guard", "test_parallel", "test_exchange"]


def oldest() -> list[str]:
    """`name==version` of the lower bounds of the pinned packages."""
    found = []
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups()
        if name in PINNED:
            # 0.36 means 0.36.0: pip would take no 0.36.0 for ==0.36.*, but one that was repaired since.
            found.append(f"{name}=={version}" + ".0" * (2 - version.count(".")))
    return found


@dataclass(frozen=True)
class Row:
    """An environment.

    Attributes:
        torch: what is installed first.
        packages: tells which versions of others are.
        extras: of this package.
        tests: names of test files.
    """

    torch: str
    packages: Callable[[], list[str]]
    extras: str
    tests: list[str]


ROWS = {
    "oldest": Row("torch==2.13.0", oldest, "test,kernel-test", TESTS),
    "compiler": Row("torch==2.8.0", lambda: [*PINNED], "test", GRAPHS),
    # Without the extra that holds Triton and numpy back. CPU builds of PyTorch bring no Triton, others one that fits.
    "newest": Row("torch", lambda: [*PINNED, "triton; platform_system == 'Linux'"], "test", [*TESTS, *COMPILED]),
}


def environment(folder: Path, row: str, torch: str | None) -> Path:
    """The Python of an environment with a row's versions and everything that the tests need."""
    python = folder / row / "bin" / "python"
    if not (folder / row / "ready").exists():
        venv.create(folder / row, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first: anything that needs it would bring in a build of its own choice.
        subprocess.run([*pip, torch or ROWS[row].torch], check=True)
        subprocess.run([*pip, *ROWS[row].packages(), f"{ROOT}[{ROWS[row].extras}]"], check=True)
        # The tests are to find this checkout, not a copy of it.
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "psa-diffusers"], check=True)
        (folder / row / "ready").touch()
    return python


def files(names: list[str]) -> list[str]:
    """The paths of test files. Each name has one at least."""
    found = {name: sorted((ROOT / "tests").rglob(f"{name}.py")) for name in names}
    missing = [name for name, paths in found.items() if not paths]
    if missing:
        raise SystemExit(f"no such tests: {', '.join(missing)}")
    return [str(path) for paths in found.values() for path in paths]


def versions(python: Path) -> dict[str, str]:
    code = "import json, sys; from importlib.metadata import distributions\n"
    code += "found = {each.name.replace('-', '_'): each.version for each in distributions()}\n"
    code += "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    told = subprocess.run([str(python), "-c", code, *SHOWN], check=True, capture_output=True, text=True)
    return json.loads(told.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the environments are, or will be")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--torch", help="what to install first (default: torch==2.13.0, or the newest in that row)")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest")
    options = parser.parse_args()
    results = {}
    for row in options.rows:
        arguments = options.pytest or files(ROWS[row].tests)
        python = environment(options.folder, row, options.torch)
        run = subprocess.run(
            [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        sys.stderr.write(run.stdout)
        results[row] = {
            "versions": versions(python),
            "exit_code": run.returncode,
            "said": run.stdout.strip().splitlines()[-1],
        }
    print(json.dumps(results))
    # Negative where a signal ended the tests.
    return int(any(result["exit_code"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
