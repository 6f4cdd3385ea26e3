"""The rows of the version matrix: what they install, and that the tests they name are there."""

from __future__ import annotations

import pytest
import version_matrix


@pytest.mark.parametrize("row", version_matrix.ROWS)
def test_the_tests_of_a_row_are_there(row):
    names = version_matrix.ROWS[row].tests
    found = version_matrix.files(names)
    assert len(names) == len(set(names)) and len(found) == len(set(found)) >= len(names)


def test_a_name_that_no_test_has_is_told():
    with pytest.raises(SystemExit, match="no such tests: test_of_nothing"):
        version_matrix.files(["test_habits", "test_of_nothing"])


def test_nothing_holds_the_newest_back():
    row = version_matrix.ROWS["newest"]
    assert row.torch == "torch" and "kernel-test" not in row.extras
    assert {"diffusers", "transformers", "triton"} == {each.split(";")[0] for each in row.packages()}
    assert not any(sign in each.split(";")[0] for each in row.packages() for sign in "=<>")


def test_the_oldest_are_whole_versions():
    """`pip` takes 0.36.1 for ==0.36.* where there is one."""
    packages = dict(each.split("==") for each in version_matrix.ROWS["oldest"].packages())
    assert packages.keys() == set(version_matrix.PINNED)
    assert all(version.count(".") == 2 for version in packages.values())
