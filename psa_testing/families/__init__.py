"""Tiny pipelines and published checkpoints of every model family, gathered from the files of this folder.

Each file declares `TESTS` of one family; tests are parametrised by what is gathered here, so that a new file is enough.
"""

from __future__ import annotations

import importlib
import pkgutil

from psa_testing.cases import Case, ParallelCase, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Network, Published

TESTS: tuple[FamilyTests, ...] = tuple(
    importlib.import_module(f"{__name__}.{found.name}").TESTS for found in pkgutil.iter_modules(__path__)
)
CASES: dict[str, Case] = {name: case for tests in TESTS for name, case in tests.cases.items()}
TESTS_OF: dict[str, FamilyTests] = {name: tests for tests in TESTS for name in tests.cases}
# One case a transformer's class, for what does not depend on the pipeline.
ONE_EACH: tuple[str, ...] = tuple(name for name, case in CASES.items() if case.one_each)
PARALLEL: dict[str, ParallelCase] = {name: case for tests in TESTS for name, case in tests.parallel.items()}
SAVED: dict[str, SavedCase] = {name: case for tests in TESTS for name, case in tests.saved.items()}
NETWORKS: dict[str, Network] = {name: network for tests in TESTS for name, network in tests.networks.items()}
PUBLISHED: tuple[Published, ...] = tuple(published for tests in TESTS for published in tests.published)
