"""Where a run says that its seconds went."""

import re

import pytest

from psa_diffusers.cli.generate import generate_app
from psa_diffusers.cli.shell import run_command
from psa_diffusers.environment import compiled_kernels_folder
from psa_diffusers.runs.phases import PHASES, Phases, as_line, as_rows, first_call
from psa_testing.tiny_runs import carry_out

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_first_call_of_each_kind_is_told_apart():
    phases = Phases(imports=3.0)
    # Steps 0 and 1 dense, of which the first took 4 s longer; the first sparse one took 6 s longer than the others.
    phases.add_video({"prepare": 1.0, "decode": 2.0, "per_step": [5.0, 1.0, 6.5, 0.5, 0.5, 0.5]}, dense_at=[0, 1])
    phases.add_video({"prepare": 0.5, "decode": 1.0, "per_step": [1.0, 1.0, 1.0]}, dense_at=None)
    seconds = phases.seconds()
    assert list(seconds) == [*PHASES, "total"]
    assert seconds["first_calls"] == pytest.approx(10.0)
    assert (seconds["dense_steps"], seconds["sparse_steps"]) == (5.0, 2.0)
    assert (seconds["imports"], seconds["preparation"], seconds["decoding"]) == (3.0, 1.5, 3.0)


@pytest.mark.parametrize(
    ("steps", "extra"), [([], 0), ([5.0], 0), ([1.0, 2.0], 0), ([3.0, 1.0, 1.5, 9.0], 1.5), ([2.0, 2.0], 0)]
)
def test_first_call(steps, extra):
    assert first_call(steps) == extra


def test_a_phase_that_fails_counts():
    phases = Phases()
    with pytest.raises(OSError), phases.phase("files"):
        raise OSError
    assert phases._seconds["files"] > 0


def test_the_line(monkeypatch, tmp_path):
    seconds = {**dict.fromkeys(PHASES, 0.0), "imports": 2.04, "first_calls": 4.0, "total": 6.1}
    assert as_rows(seconds) == [("imports", "2.0 s"), ("first calls", "4.0 s"), ("in all", "6.1 s")]
    assert as_line(seconds, "cpu") == "seconds: imports 2.0, first calls 4.0, in all 6.1"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert as_line(seconds, "cuda:0").endswith(f"kept for later runs in {tmp_path}")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert compiled_kernels_folder() == str(tmp_path / ".triton" / "cache")


def test_the_folder_is_where_triton_keeps_its_kernels(monkeypatch, tmp_path):
    triton = pytest.importorskip("triton", reason="needs triton")
    knobs = pytest.importorskip("triton.knobs", reason="this triton has no knobs")
    assert triton
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
        assert compiled_kernels_folder() == knobs.cache.dir
        monkeypatch.setenv(name, str(tmp_path / name))
        assert compiled_kernels_folder() == knobs.cache.dir
        monkeypatch.delenv(name)


def test_a_run_tells_them_in_json_terminal_and_report(ask, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("psa_diffusers.runs.phases.NOTICEABLE", 0.0)  # a machine may be fast
    summary = carry_out(ask("a cat", compare=True))
    seconds = summary["seconds"]
    assert list(seconds) == [*PHASES, "total"]
    spent = ("imports", "loading", "dense_steps", "sparse_steps", "decoding", "files", "report")
    assert all(seconds[name] > 0 for name in spent)
    assert sum(seconds[name] for name in PHASES) == pytest.approx(seconds["total"], abs=0.1)
    page = (tmp_path / "out" / "report.html").read_text()
    table = page[page.index("Where the seconds went") :]
    rows = re.findall(r"<th scope=\"row\">([^<]+)</th><td>([0-9.]+) s</td>", table[: table.index("</table>")])
    assert [name for name, _ in rows] == [*PHASES.values(), "in all"]
    # Continued with nothing left to make, neither the line nor the table claims anything.
    arguments = ["--model", str(saved / "wan"), "--preset", str(saved / "small.yaml"), "--steps", "2", "--frames", "5"]
    arguments += ["--height", "64", "--width", "64", "--output", str(tmp_path / "other"), "a cat"]
    capsys.readouterr()
    for made in (True, False):
        assert run_command("psa-generate", generate_app, arguments) == 0
        assert ("\nseconds: " in capsys.readouterr().err) == made
        page = (tmp_path / "other" / "report.html").read_text()
        assert ("Where the seconds went" in page) == made
