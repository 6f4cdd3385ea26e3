"""Run the tests with the oldest and the newest diffusers and transformers that are supported, each in an environment.

    python scripts/version_matrix.py --folder /tmp/versions
    python scripts/version_matrix.py --folder /tmp/versions --rows oldest -- -x tests/patch/test_processor.py

What follows `--` goes to pytest; by default the tests that run pipelines. The oldest versions are those that
pyproject.toml names. An environment that is there already is used again. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Packages whose oldest supported version the row `oldest` takes; of the others pip takes what fits these.
PINNED = ("diffusers", "transformers")
SHOWN = ("torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "peft", "numpy")
TESTS = [
    *("test_processor", "test_experts", "test_fallbacks", "test_denoising", "test_families", "test_lookup"),
    *("test_stock_processors", "test_text", "test_changed_pipelines"),
    *("test_compiled", "test_finite_guard", "test_beside_caches", "test_beside_others"),
    *("test_pipelines", "test_generate", "test_run_folder", "test_pipeline_call", "test_demo"),
    *("test_parallel", "test_calibrate", "test_memory", "test_security"),
]


def oldest() -> list[str]:
    """`name==version` of the lower bounds of the pinned packages."""
    found = []
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)>=([\w.]+)", line).groups()
        if name in PINNED:
            # 0.36 means 0.36.0: pip would take no 0.36.0 for ==0.36.*, but one that was repaired since.
            found.append(f"{name}=={version}" + ".0" * (2 - version.count(".")))
    return found


ROWS = {"oldest": oldest, "newest": lambda: list(PINNED)}


def environment(folder: Path, row: str, torch: str) -> Path:
    """The Python of an environment with a row's versions and everything that the tests need."""
    python = folder / row / "bin" / "python"
    if not (folder / row / "ready").exists():
        venv.create(folder / row, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first: anything that needs it would bring in the newest build with all of CUDA.
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, *ROWS[row](), f"{ROOT}[test,kernel-test]"], check=True)
        # The tests are to find this checkout, not a copy of it.
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "psa-diffusers"], check=True)
        (folder / row / "ready").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    code = "import json, sys; from importlib.metadata import version\n"
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    told = subprocess.run([str(python), "-c", code, *SHOWN], check=True, capture_output=True, text=True)
    return json.loads(told.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the environments are, or will be")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install first (default: %(default)s)")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest")
    options = parser.parse_args()
    arguments = options.pytest or [str(path) for name in TESTS for path in sorted((ROOT / "tests").rglob(f"{name}.py"))]
    results = {}
    for row in options.rows:
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
