"""Imports go down only: what a room may know is said here, once, and no two modules import each other."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top; rooms of one floor do not know each other.
FLOORS = (
    ("cli",),
    ("calibrate",),
    ("runs",),
    ("report",),
    ("patch",),
    ("checkpoints",),
    ("families", "psa_transformers"),
    ("psa_presets",),
    ("psa_kernels",),
    ("errors", "environment", "files", "diffusers_internals"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
OURS = ("psa_diffusers", "psa_transformers", "psa_presets", "psa_kernels")
FOREIGN = {  # what a package may not import, even where it could
    "psa_kernels": ("diffusers", "transformers", "psa_diffusers", "psa_transformers", "psa_presets"),
    "psa_presets": ("diffusers", "transformers", "psa_diffusers", "psa_transformers"),
    "psa_transformers": ("diffusers", "psa_diffusers"),
    "psa_diffusers": ("psa_transformers",),
}
MAX_LINES = 400
DOOR = "psa_diffusers"  # its __init__ names what users import, and imports it when it is asked for


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for package in OURS:
            for path in sorted((base / package).rglob("*.py")):
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def homes() -> dict[str, str]:
    """Where the names come from that the package gives to users."""
    for node in ast.walk(ast.parse(MODULES[DOOR].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "_HOMES":
            return {name: resolve_name(home, DOOR) for name, home in ast.literal_eval(node.value).items()}
    raise AssertionError("psa_diffusers/__init__.py has no _HOMES")


def room(module: str) -> str:
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == DOOR else package


def imported(source: str, module: str, is_package: bool, packages: tuple[str, ...] = OURS) -> list[tuple[str, int]]:
    """The modules of some packages that a module imports, anywhere in it, with the line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if base == DOOR and whole not in MODULES:
                    found += [(HOMES[alias.name], node.lineno)] if alias.name in HOMES else []
                else:
                    found.append((whole if whole in MODULES else base, node.lineno))
    return [(name, line) for name, line in found if name.split(".")[0] in packages]


HOMES = homes()
IMPORTS = {
    name: imported(path.read_text(encoding="utf-8"), name, path.name == "__init__.py") for name, path in MODULES.items()
}


def is_allowed(importer: str, target: str) -> bool:
    if importer == DOOR:
        return True
    packages = importer.split(".")[0], target.split(".")[0]
    if packages[1] in FOREIGN[packages[0]]:
        return False
    above, below = FLOOR[room(importer)], FLOOR[room(target)]
    return room(importer) == room(target) or above < below or above == below == len(FLOORS) - 1


def test_every_module_has_a_room():
    assert {room(name) for name in MODULES if name != DOOR} == set(FLOOR)


def test_imports_go_down():
    upwards = [
        f"{MODULES[name].relative_to(ROOT)}:{line} imports {target}"
        for name, found in IMPORTS.items()
        for target, line in found
        if not is_allowed(name, target)
    ]
    assert not upwards, "\n".join(upwards)


def test_no_two_modules_import_each_other():
    graph = {name: {target for target, _ in found} - {name} for name, found in IMPORTS.items() if name != DOOR}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("package", FOREIGN)
def test_a_package_does_not_know(package):
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in MODULES.items()
        if name.split(".")[0] == package
        for target, line in imported(
            path.read_text(encoding="utf-8"), name, path.name == "__init__.py", FOREIGN[package]
        )
    ]
    assert not found, "\n".join(found)


def test_files_can_be_read_in_one_sitting():
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    long = [f"{path}: {count} lines, at most {MAX_LINES}" for path, count in lines.items() if count > MAX_LINES]
    assert not long, "\n".join(long)


@pytest.mark.parametrize(
    ("importer", "line", "target"),
    [
        ("psa_diffusers.report.html", "from psa_diffusers.runs.folder import RunFolder", "psa_diffusers.runs.folder"),
        ("psa_diffusers.report.html", "def f():\n    import psa_diffusers.cli.shell", "psa_diffusers.cli.shell"),
        ("psa_presets.model", "from psa_diffusers import apply_psa", "psa_diffusers.patch.apply"),
        ("psa_diffusers.families.wan", "from ..checkpoints import kinds", "psa_diffusers.checkpoints.kinds"),
        ("psa_transformers.patch", "from psa_diffusers.files import write_json", "psa_diffusers.files"),
        ("psa_kernels.spec", "from psa_diffusers.errors import InputError", "psa_diffusers.errors"),
        ("psa_diffusers.files", "if 1:\n    from psa_kernels import AttentionSpec", "psa_kernels"),
    ],
)
def test_an_import_that_goes_up_is_seen(importer, line, target):
    assert [name for name, _ in imported(line, importer, False)] == [target]
    assert not is_allowed(importer, target)
