"""psa-generate on saved pipelines of other families than Wan: loaded, run and reported."""

from __future__ import annotations

import json

import pytest

from psa_diffusers.checkpoints import resolve
from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.runs.check.check import check_plan
from psa_diffusers.runs.generate import run
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.request import Request
from psa_testing.families import SAVED
from psa_testing.tiny_pipelines import tiny_image

# The toys of LTX have a VAE that compresses less than any released one; some layers of Motif attend two videos at once.
UNFORESEEN = ("ltx-i2v", "ltx2", "motif-video")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_pipeline_runs(name, tmp_path, monkeypatch):
    saved, pipe = SAVED[name], SAVED[name].build()
    pipe.save_pretrained(tmp_path / "model")
    # What other packages do, stand-ins do here.
    monkeypatch.setattr(resolve, "is_installed", lambda package: True)
    for method, stand_in in saved.stand_ins.items():
        monkeypatch.setattr(type(pipe), method, stand_in)
    (tmp_path / "small.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.3, 0.5, 0.7]\n")
    kind = PIPELINE_KINDS[type(pipe).__name__]
    tiny_image(saved.size, saved.size).save(tmp_path / "image.png")
    request = Request(
        prompts=("a cat",),
        model=str(tmp_path / "model"),
        preset=str(tmp_path / "small.yaml"),
        output=str(tmp_path / "out"),
        image=str(tmp_path / "image.png") if kind.takes_image else None,
        guidance=3.0 if kind.guided else None,
        strict=True,
        steps=3 + kind.idle_steps,
        height=saved.size,
        width=saved.size,
        frames=saved.frames,
    )
    plan = make_plan(request)
    (expert,) = check_plan(plan).experts
    summary = run(plan)
    assert summary["status"] == "complete" and summary["prompts"][0]["density"] < 1
    folder = next(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    run_report = json.loads((folder / "report.json").read_text())["runs"]["small"]
    attention = run_report["attention"]
    assert len(attention["layers"]) == plan.model.num_layers and attention["fallbacks"] == {}
    assert (attention["steps"], attention["dense_steps"]) == (3, 1)
    assert len(run_report["seconds"]["per_step"]) == 3
    assert (expert.network.layers, expert.network.dense_layers) == (tuple(attention["layers"]), {})
    if name not in UNFORESEEN:
        assert expert.density == pytest.approx(attention["density_sparse"])
    assert ("sound" in run_report) == (kind.sound is not None)
