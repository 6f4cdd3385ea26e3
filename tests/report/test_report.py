"""The report is one file, complete, and nothing in a prompt can get out of its place."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from psa_diffusers.report.compare import write_comparison
from psa_diffusers.report.html import write_report
from psa_diffusers.report.panels import Label
from psa_diffusers.report.svg import line_plot, nice_ticks, value_map
from psa_diffusers.report.video import write_video

HOSTILE = "<script>alert(1)</script>\"'&</title>"


class Links(HTMLParser):
    """Every tag, and every address in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "data", "poster", "action")]


def a_report(folder, prompt="a cat", name="0000-a-cat") -> dict:
    path = folder / name
    path.mkdir()
    frames = np.random.default_rng(0).uniform(0, 1, (3, 32, 32, 3)).astype(np.float32)
    comparison = write_comparison(path, frames, frames * 0.9, (Label("dense"), Label("psa-3")), 8)
    files = comparison.pop("files")
    for run in ("dense", "psa-3"):
        write_video(path / f"{run}.mp4", frames, 8)
    seconds = {"total": 3.0, "prepare": 0.5, "denoise": 2.0, "decode": 0.5, "per_step": [1.0, 1.0], "median_step": 1.0}
    attention = {
        "density": [[1.0, 1.0], [0.25, None]],
        "dense_steps": 1,
        "density_run": 0.75,
        "density_sparse": 0.25,
        "coverage_sparse": 0.45,
        "implementation": "reference",
    }
    dense = {"seconds": seconds, "warnings": [], "attention": None, "peak_memory_gib": None}
    sparse = {"seconds": {**seconds, "median_sparse_step": 0.5}, "warnings": ["1 of 3 frames are all black"]}
    return {
        "prompt": prompt,
        "folder": name,
        "preset": "psa-3",
        "seed": 7,
        "videos": {"dense": "dense.mp4", "psa-3": "psa-3.mp4"},
        "files": files,
        "runs": {"dense": dense, "psa-3": {**sparse, "attention": attention, "peak_memory_gib": None}},
        "comparison": {**comparison, "speedup": {"total": 1.5, "denoise": 1.6, "sparse_step": 2.0}},
        "settings": {"model": "demo", "frames": 3, "width": 32, "height": 32, "fps": 8, "steps": 2, "seed": 7,
                     "negative_prompt": HOSTILE, "preset_rules": {"thresholds": [0.15, 0.25, 0.45]}},
        "versions": {"torch": "9.9.9"},
        "hardware": {"processor": "a processor", "cores": 2},
        "load_seconds": 1.25,
    }  # fmt: skip


def test_everything_is_inside_and_escaped(tmp_path):
    reports = [a_report(tmp_path, HOSTILE), a_report(tmp_path, "a dog", "0001-a-dog")]
    html = write_report(tmp_path, reports, missing=2).read_text(encoding="utf-8")
    page = Links(html)
    assert page.tags.count("script") == 1  # the report's own
    assert page.tags.count("video") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    local = [address for address in page.addresses if not address.startswith("data:")]
    assert all(address.startswith(("0000-a-cat/", "0001-a-dog/")) for address in local)
    assert "http" not in re.sub(r"data:[^\"]*", "", html)
    assert not re.search(r"@import|url\(", html)


def test_the_figures_are_there(tmp_path):
    html = write_report(tmp_path, [a_report(tmp_path)]).read_text(encoding="utf-8")
    figures = ("1.50\u00d7", "2.00\u00d7", "0.75", "1.25", "1 of 3 frames are all black", "not measured")
    settings = ("9.9.9", "a processor", "thresholds", "[0.15, 0.25, 0.45]")
    plots = ("Density by layer and step", "PSNR by frame", "SSIM by frame", "Flicker by frame")
    for text in (*figures, *settings, *plots):
        assert text in html
    assert "still missing" not in html


def test_a_report_of_an_earlier_version_says_nothing_of_the_dense_steps_share(tmp_path):
    report = a_report(tmp_path)
    assert "of the denoising time" not in write_report(tmp_path, [report]).read_text(encoding="utf-8")
    report["runs"]["psa-3"]["seconds"] |= {"dense_steps": 1, "dense_share": 0.505}
    page = write_report(tmp_path, [report]).read_text(encoding="utf-8")
    assert page.count("1 of 2 steps dense: 50 % of the denoising time") == 1


def test_the_flicker_is_shown_and_missed_where_an_earlier_version_did_not_measure_it(tmp_path):
    report = a_report(tmp_path)
    change = {"reference": 2.0, "other": 3.0, "ratio": 1.5}
    report["comparison"]["flicker"] = {"mean": 4.321, "worst": 8.765, "per_frame": [None, 4.0, 8.765], "change": change}
    page = write_report(tmp_path, [report]).read_text(encoding="utf-8")
    assert "4.32 of 255" in page and "8.77 of 255" in page and "<b>4.3</b><span>flicker</span>" in page
    assert "<td>1.50\u00d7</td>" in page
    del report["comparison"]["flicker"]
    assert "licker" not in write_report(tmp_path, [report]).read_text(encoding="utf-8")


def test_a_headline_is_the_mean_of_what_is_known(tmp_path):
    """A prompt whose frames are all equal has no finite PSNR, which is not one of 0 dB."""
    reports = [a_report(tmp_path), a_report(tmp_path, "a dog", "0001-a-dog")]
    reports[0]["comparison"]["psnr"]["mean"] = 30.0
    reports[1]["comparison"]["psnr"]["mean"] = None
    page = write_report(tmp_path, reports).read_text(encoding="utf-8")
    assert "30.0 dB" in page and "15.0 dB" not in page


def test_the_picture_of_the_attention_is_inside(tmp_path):
    report = a_report(tmp_path)
    assert "Where one block of queries looks" not in write_report(tmp_path, [report]).read_text(encoding="utf-8")
    (tmp_path / "0000-a-cat" / "attention.png").write_bytes(b"picture")
    report["files"]["attention"] = "attention.png"
    html = write_report(tmp_path, [report]).read_text(encoding="utf-8")
    assert "Where one block of queries looks" in html
    assert "data:image/png;base64,cGljdHVyZQ==" in html


def test_a_stopped_run_says_what_is_missing(tmp_path):
    html = write_report(tmp_path, [a_report(tmp_path)], missing=1).read_text(encoding="utf-8")
    assert "This run was stopped: 1 prompt still missing" in html


def test_videos_past_the_limit_are_linked(tmp_path, monkeypatch):
    monkeypatch.setattr("psa_diffusers.report.html.MAX_VIDEO_BYTES", 10)
    html = write_report(tmp_path, [a_report(tmp_path)]).read_text(encoding="utf-8")
    assert "<video" not in html
    assert "Too large to embed" in html


def test_line_plot_breaks_at_gaps_and_covers_the_span():
    svg = line_plot([("psnr", [30.0, 31.0, None, 32.0, 33.0, None, 31.0])], "frame", "dB")
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 1
    assert line_plot([("nothing", [None, float("nan")])], "frame", "dB") == ""
    ripple = line_plot([("psnr", [30.0, 30.01])], "frame", "dB", span=3)
    assert ">28<" in ripple or ">28.5<" in ripple
    assert ">0<" in line_plot([("seconds", [3.0, 4.0])], "step", "s", from_zero=True)


def test_value_map_has_one_pixel_a_cell_and_blanks():
    import base64
    import io

    from PIL import Image

    svg = value_map([[0.0, 1.0, None], [0.5, 0.5, 0.5]], "step", "layer")
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])))
    assert image.size == (2, 3)
    assert image.getpixel((0, 2))[3] == 0
    assert image.getpixel((0, 0))[0] > image.getpixel((1, 0))[0] > image.getpixel((0, 1))[0]  # dense is darkest


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (28.1, 33.9), (0.93, 0.97), (5.0, 5.0), (0.0, 0.0), (1e-4, 3e-4), (120.0, 9000.0)]
)
def test_ticks_cover_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8
