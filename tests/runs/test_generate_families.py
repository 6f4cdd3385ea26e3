"""psa-generate on saved pipelines of other families than Wan: loaded, run and reported."""

from __future__ import annotations

import json

import pytest
from diffusers import HunyuanVideo15Pipeline

from psa_diffusers.runs.generate import run
from psa_diffusers.runs.plan import Request, make_plan
from psa_testing.tiny_families.allegro import tiny_allegro
from psa_testing.tiny_families.cogvideox import tiny_cogvideox_1_5
from psa_testing.tiny_families.hunyuan_video import tiny_framepack, tiny_hunyuan_video
from psa_testing.tiny_families.hunyuan_video15 import embeddings, tiny_hunyuan_video15
from psa_testing.tiny_families.ltx import tiny_ltx_i2v
from psa_testing.tiny_families.mochi import tiny_mochi
from psa_testing.tiny_families.wan_relatives import tiny_wan_vace
from psa_testing.tiny_pipelines import tiny_image, tiny_text_encoder, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def hunyuan_video15():
    """A saved pipeline has text encoders; `stand_in_texts` does not call them."""
    pipe = tiny_hunyuan_video15()
    pipe.register_modules(
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_text_encoder(),
        tokenizer_2=tiny_tokenizer(),
    )
    return pipe


PIPELINES = {
    # builder, height, frames
    "hunyuan-video": (tiny_hunyuan_video, 64, 9),
    "cogvideox-1.5": (tiny_cogvideox_1_5, 64, 17),
    "ltx-i2v": (tiny_ltx_i2v, 32, 9),
    "mochi": (tiny_mochi, 64, 13),
    "wan-vace": (tiny_wan_vace, 64, 9),
    "hunyuan-video-1.5": (hunyuan_video15, 32, 5),
    "framepack-i2v": (tiny_framepack, 64, 9),
    "allegro": (tiny_allegro, 64, 8),
}


@pytest.fixture
def stand_in_texts(monkeypatch):
    """Whatever HunyuanVideo 1.5 is asked, its text is the same: its text encoders have no tiny build."""

    def encode_prompt(self, **arguments):
        return tuple(embeddings(7)[f"prompt_embeds{part}"] for part in ("", "_mask", "_2", "_mask_2"))

    monkeypatch.setattr(HunyuanVideo15Pipeline, "encode_prompt", encode_prompt)


@pytest.mark.usefixtures("stand_in_texts")
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
        image=str(tmp_path / "image.png") if name.endswith(("i2v", "vace")) else None,
        guidance=3.0,
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
    run_report = json.loads((folder / "report.json").read_text())["runs"]["small"]
    attention = run_report["attention"]
    assert len(attention["layers"]) == plan.model.num_layers and attention["fallbacks"] == {}
    assert (attention["steps"], attention["dense_steps"]) == (3, 1)
    assert len(run_report["seconds"]["per_step"]) == 3
