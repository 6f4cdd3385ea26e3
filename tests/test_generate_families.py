"""psa-generate on saved pipelines of other families than Wan: loaded, run and reported."""

from __future__ import annotations

import json

import pytest
from tiny_families.cogvideox import tiny_cogvideox_1_5
from tiny_families.hunyuan_video import tiny_hunyuan_video
from tiny_families.ltx import tiny_ltx_i2v
from tiny_families.mochi import tiny_mochi
from tiny_pipelines import tiny_image

from psa_diffusers.generate import run
from psa_diffusers.settings import Request, make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

PIPELINES = {
    # builder, height, frames
    "hunyuan-video": (tiny_hunyuan_video, 64, 9),
    "cogvideox-1.5": (tiny_cogvideox_1_5, 64, 17),
    "ltx-i2v": (tiny_ltx_i2v, 32, 9),
    "mochi": (tiny_mochi, 64, 13),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_saved_pipeline_runs(name, tmp_path):
    build, size, frames = PIPELINES[name]
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "small.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.3, 0.5, 0.7]\n")
    tiny_image(size, size).save(tmp_path / "image.png")
    request = Request(
        prompts=("a cat",),
        model=str(tmp_path / "model"),
        preset=str(tmp_path / "small.yaml"),
        output=str(tmp_path / "out"),
        image=str(tmp_path / "image.png") if name.endswith("i2v") else None,
        strict=True,
        steps=3,
        height=size,
        width=size,
        frames=frames,
    )
    plan = make_plan(request)
    summary = run(plan)
    assert summary["status"] == "complete" and summary["prompts"][0]["density"] < 1
    folder = next(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    attention = json.loads((folder / "report.json").read_text())["runs"]["small"]["attention"]
    assert len(attention["layers"]) == plan.model.num_layers and attention["fallbacks"] == {}
    assert (attention["steps"], attention["dense_steps"]) == (3, 1)
