"""The table of skipped tests has one line a reason, whether a mark, a test or a whole file says it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from psa_testing.skip_table import skip_table

ROOT = Path(__file__).parents[1]
TESTS = {
    "test_a.py": "import pytest\n@pytest.mark.skip(reason='no GPU')\n"
    "@pytest.mark.parametrize('i', range(3))\ndef test_x(i): ...\n",
    "test_b.py": "import pytest\ndef test_y():\n    pytest.skip('no GPU')\ndef test_z(): ...\n",
    "test_c.py": "import pytest\npytest.importorskip('no_such_module', reason='no such module')\n",
}


def test_reasons_are_grouped():
    given = [(f"tests/{number}.py", "Skipped: no\nGPU") for number in range(5)] + [("tests/x.py", "old")] * 2
    assert skip_table(given) == ["    5  no GPU  0.py, 1.py, 2.py and 2 more", "    2  old     x.py"]
    assert skip_table([]) == []


@pytest.mark.parametrize("processes", ["0", "2"])
def test_pytest_ends_with_it(processes, tmp_path):
    (tmp_path / "conftest.py").write_text("from psa_testing.skip_table import pytest_terminal_summary\n")
    for name, text in TESTS.items():
        (tmp_path / name).write_text(text)
    options = ["-p", "no:cacheprovider", "-n", processes, f"--rootdir={tmp_path}", "-c", "/dev/null"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    start = next(number for number, line in enumerate(said) if "5 skipped, and why" in line)
    assert [line.split() for line in said[start + 1 : start + 3]] == [
        ["4", "no", "GPU", "test_a.py,", "test_b.py"],
        ["1", "no", "such", "module", "test_c.py"],
    ]
    assert "1 passed, 5 skipped" in said[-1]
