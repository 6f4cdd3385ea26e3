"""How FlexPrefill is found and brought to a density; what it computes is its package's affair."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from operator_bench import flex_prefill

ROWS = 100


@pytest.fixture(autouse=True)
def no_package(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "minference"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "minference"]:
        del sys.modules[name]


def test_the_beginning_of_the_package_is_passed_by(tmp_path, monkeypatch):
    home = tmp_path / "minference" / "modules"
    home.mkdir(parents=True)
    (tmp_path / "minference" / "__init__.py").write_text("from .cuda import nothing\n")
    (tmp_path / "minference" / "other.py").write_text("ANSWER = 42\n")
    (home / "__init__.py").touch()
    (home / "flexprefill.py").write_text("from ..other import ANSWER\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert flex_prefill.load().ANSWER == 42
    assert flex_prefill.load() is flex_prefill.load()


def test_without_the_package_there_is_an_import_error(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match="minference"):
        flex_prefill.load()


def active_blocks(q, k, v, block, gamma, least, most):
    """In every row a share `gamma` of the blocks up to the diagonal, at least one."""
    pairs = [row * ROWS + column for row in range(ROWS) for column in range(max(round(gamma * (row + 1)), least))]
    return [[torch.tensor(pairs)] * 2]


@pytest.mark.parametrize("wanted", [0.05, 0.15, 0.35, 0.9])
def test_a_density_is_found(wanted):
    module = SimpleNamespace(get_active_blocks=active_blocks, flex_prefill_attention=lambda *given, **_: given[-1])
    q = torch.empty(1, ROWS * flex_prefill.BLOCK - 5, 2, 1)
    found, call = flex_prefill.at_density(q, q, q, wanted, module)
    assert found == pytest.approx(wanted, rel=0.03)
    assert flex_prefill.density(active_blocks(q, q, q, 128, call(), 1, 0), q.shape[1]) == found


def test_the_whole_triangle_has_density_one():
    assert flex_prefill.density(active_blocks(None, None, None, 128, 1.0, 1, 0), ROWS * flex_prefill.BLOCK) == 1
