"""A few rounds of the campaigns in scripts/campaigns, which run for hours by hand."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CAMPAIGNS = Path(__file__).parents[2] / "scripts" / "campaigns"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def first_seed():
    seed = random.randrange(2**31)
    print(f"repeat with --rounds 1 --seed N from {seed} on")
    return seed


def test_operator_calls(first_seed):
    import operator_calls

    for seed in range(first_seed, first_seed + 12):
        operator_calls.check(seed)


def test_memory_calls_are_valid():
    import memory_calls

    from psa_kernels import AttentionSpec

    specs = [AttentionSpec(**case[-1]) for case in memory_calls.CASES]
    assert {spec.rule for spec in specs} == {"count", "mass", "budget"}
    assert {
        memory_calls.serves_hopper(*case[:2], spec) for case, spec in zip(memory_calls.CASES, specs, strict=True)
    } == {
        True,
        False,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_calls_agree_with_the_reference():
    subprocess.run([sys.executable, CAMPAIGNS / "memory_calls.py"], check=True)


def test_broken_files(first_seed, tmp_path):
    import broken_files

    words = {broken_files.check(seed, tmp_path) for seed in range(first_seed, first_seed + 200)}
    assert {"preset read", "preset refused", "prompts read"} <= words


def test_a_campaign_tells_what_failed(capsys):
    import rounds

    def check(seed):
        assert seed != 8, "eight"
        return "even" if seed % 2 == 0 else "odd"

    options = rounds.parser("", 5).parse_args(["--seed", "6"])
    assert rounds.campaign(check, options) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["outcomes"] == {"even": 2, "odd": 2, "failed": 1} and found["failed"] == [8] and found["rounds"] == 5
    assert "eight" in told.err


# Each as a script of its own, after another that has imported what both need.
IN_TURN = """
import runpy, sys
from pathlib import Path
scripts = sys.argv[1:]
sys.path.insert(0, str(Path(scripts[0]).parent))
for script in scripts:
    sys.argv = [script, "--rounds", "1"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(f"{Path(script).stem}: {end.code}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork processes")
def test_disturbed_runs():
    """In a process of their own, for they fork."""
    names = ("killed_runs", "full_disk")
    scripts = [str(CAMPAIGNS / f"{name}.py") for name in names]
    said = subprocess.run([sys.executable, "-c", IN_TURN, *scripts], capture_output=True, text=True)
    lines = said.stdout.splitlines()
    assert lines[1::2] == [f"{name}: 0" for name in names], said.stderr[-4000:]
    assert [json.loads(line)["rounds"] for line in lines[::2]] == [1, 1]
