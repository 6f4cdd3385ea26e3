"""Tiny pipelines and published checkpoints of every model family, gathered from the files of this folder.

Each file declares `TESTS` of one family; tests are parametrised by what is gathered here, so that a new file is enough.
"""

from __future__ import annotations

import importlib
import pkgutil

import diffusers

from psa_diffusers.families import FAMILIES, ModelFamily
from psa_testing.cases import Case, ParallelCase, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Network, Published


def _declared(name: str) -> tuple[FamilyTests, ...]:
    """What a file declares; nothing where the installed diffusers, an older one, lacks what the file takes from it."""
    try:
        return (importlib.import_module(f"{__name__}.{name}").TESTS,)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "diffusers":
            return ()
        raise


# The families whose transformers the installed diffusers has: all of them, unless it is an older one.
HERE: tuple[type[ModelFamily], ...] = tuple(
    family for family in FAMILIES if all(hasattr(diffusers, name) for name in family.transformers)
)
TESTS: tuple[FamilyTests, ...] = tuple(
    tests for found in pkgutil.iter_modules(__path__) for tests in _declared(found.name)
)
CASES: dict[str, Case] = {name: case for tests in TESTS for name, case in tests.cases.items()}
TESTS_OF: dict[str, FamilyTests] = {name: tests for tests in TESTS for name in tests.cases}
# One case a transformer's class, for what does not depend on the pipeline.
ONE_EACH: tuple[str, ...] = tuple(name for name, case in CASES.items() if case.one_each)
PARALLEL: dict[str, ParallelCase] = {name: case for tests in TESTS for name, case in tests.parallel.items()}
SAVED: dict[str, SavedCase] = {name: case for tests in TESTS for name, case in tests.saved.items()}
NETWORKS: dict[str, Network] = {name: network for tests in TESTS for name, network in tests.networks.items()}
PUBLISHED: tuple[Published, ...] = tuple(published for tests in TESTS for published in tests.published)
