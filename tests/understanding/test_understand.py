"""psa-understand on a tiny saved model: answers and figures, and one line for what is wrong."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from psa_diffusers.report.video import write_video
from psa_testing.tiny_language_models import tiny
from psa_testing.toy_processor import ToyProcessor
from psa_transformers.ask import QuestionError, read_frames
from psa_transformers.cli import run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("understand")
    tiny("qwen2_5_vl")[0].save_pretrained(made / "vlm")
    tiny("llama")[0].save_pretrained(made / "llm")
    frames = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    write_video(made / "film.mp4", frames, 8)
    (made / "words.mp4").write_text("no video at all")
    (made / "full.yaml").write_text("block: {query: 32, key: 16}\nlevels: [1]\nthresholds: [1.0]\n")
    (made / "sparse.yaml").write_text("block: {query: 32, key: 16}\nrule: budget\ndensity: 0.3\n")
    return made


@pytest.fixture
def understand(folder, monkeypatch, capsys):
    """Runs the command; its exit code and what it printed."""
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda _: ToyProcessor())
    monkeypatch.chdir(folder)

    def start(*given: str, video: str = "film.mp4", model: str = "vlm", preset: str = "full.yaml"):
        always = ("--max-new-tokens", "4", "--num-frames", "6", "--min-tokens", "64", "--device", "cpu")
        # The last tokens are text in any case: with a short question the video ends before them.
        question = "What happens? " * 40
        code = run([video, question, "--model", model, "--preset", preset, *always, *given])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    return start


def test_a_relative_name_with_a_colon_is_no_address(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "fi:lm.mp4").hardlink_to(folder / "film.mp4")
    assert read_frames(Path("fi:lm.mp4"), 4).total == 12


def test_an_answer_and_its_figures(understand):
    code, lines, _ = understand("--compare")
    assert code == 0 and [line.split(":")[0] for line in lines] == ["dense", "dense", "sparse", "sparse"]
    assert lines[0].removeprefix("dense") == lines[2].removeprefix("sparse")
    assert re.fullmatch(r"dense: \d+ tokens read in \d+\.\d\d s", lines[1])
    assert re.fullmatch(r"sparse: \d+ tokens read in \d+\.\d\d s, density 1\.000", lines[3])


def test_a_sparse_answer(understand):
    code, lines, _ = understand(preset="sparse.yaml")
    assert code == 0 and len(lines) == 2
    assert 0.3 < float(lines[1].rpartition(" ")[2]) < 0.95


def test_a_prompt_that_is_too_short_says_so(understand):
    code, lines, _ = understand("--min-tokens", "8192")
    assert code == 0 and "nothing was sparse: the prompt is shorter than --min-tokens" in lines[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": "missing.mp4"}, "missing.mp4: no such file"),
        ({"video": "x" * 300}, f"{'x' * 300}: no such file"),
        ({"video": "words.mp4"}, "words.mp4: no video that can be read"),
        ({"model": "vlm/config.json"}, "model vlm/config.json: a file; allowed: a folder or a hub id"),
        ({"model": "llm"}, "model llm: a llama sees no images or videos"),
        ({"model": "nobody/nothing"}, "model nobody/nothing: cannot be loaded"),
        ({"preset": "psa-33"}, "preset 'psa-33': no such file"),
    ],
)
def test_one_line_for_what_is_wrong(understand, monkeypatch, changes, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, lines, error = understand(**changes)
    assert code == 2 and not lines
    assert error.startswith(f"psa-understand: error: {message}") and error.count("\n") == 1


def change_weights(change):
    """What changes the weights of a folder."""

    def changed(folder):
        file = folder / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return changed


def change_text(**settings):
    """What changes the settings of the decoder of a folder."""

    def changed(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["text_config"] |= settings
        file.write_text(json.dumps(config))

    return changed


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


UP = "model.layers.1.mlp.up_proj.weight"  # in a file; in the model language_model stands between
IN_MODEL = UP.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be loaded: SafetensorError: "),
        (
            change_weights(lambda weights: weights.pop(UP)),
            f"its weights lack {IN_MODEL}; the files are not complete, or ",
        ),
        (
            change_weights(lambda weights: weights.update({UP: weights[UP][:5].clone()})),
            f"{IN_MODEL} in its weights and in config.json differ in size",
        ),
        (change_text(num_hidden_layers="two"), "cannot be loaded: StrictDataclassFieldValidationError: "),
        (change_text(hidden_act="foo"), "cannot be loaded: KeyError: 'foo'"),
    ],
)
def test_a_damaged_model(understand, folder, tmp_path, damage, message):
    shutil.copytree(folder / "vlm", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    code, lines, error = understand(model=str(tmp_path / "damaged"))
    (line,) = [line for line in error.splitlines() if line.startswith("psa-understand")]  # after a bar of progress
    assert (code, lines) == (2, []) and error.endswith(f"{line}\n")
    assert line.startswith(f"psa-understand: error: model {tmp_path / 'damaged'}: {message}")


def test_a_model_that_psa_refuses_is_refused_before_the_video_is_read(understand, monkeypatch):
    def refuse(*_):
        raise ValueError("Nobody: computes something else")

    monkeypatch.setattr("psa_transformers.apply.check_comparisons", refuse)
    monkeypatch.setattr("psa_transformers.ask.read_frames", None)
    code, lines, error = understand("--compare")
    assert (code, lines) == (2, [])
    assert error == "psa-understand: error: model vlm: Nobody: computes something else\n"


def test_output_that_cannot_be_written(understand, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, error = understand()
    assert code == 1 and "psa-understand: error: cannot write: [Errno 28]" in error and error.endswith("\n")


def test_letters_that_the_encoding_of_stdout_lacks(understand, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(ToyProcessor, "batch_decode", lambda *_, **__: ["caf\xe9 \ud83d"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    code, _, _ = understand()
    assert code == 0 and written.getvalue().startswith(b"sparse: caf\\xe9 \\ud83d\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("precision: int8_qk", "precision = 'int8_qk': causal attention does not have it"),
        ("dense_steps: 1.0", "dense_steps = 1.0: nothing would be sparse"),
        ("levels: [2, 4]\nthresholds: [0.1, 0.2]", "levels = [2, 4]: blocks beside the diagonal are exact"),
        ("layers: [{match: 50, floor: 0.1}]", "layers[0].match = '50': there is no layer 50"),
        ('layers: [{match: "0-", dense: true}]', "layers: these rules keep all 2 layers of the model dense"),
    ],
)
def test_a_preset_is_refused_before_the_video_is_read(understand, monkeypatch, folder, settings, message):
    (folder / "refused.yaml").write_text(settings)
    monkeypatch.setattr("psa_transformers.ask.read_frames", None)
    code, lines, error = understand("--compare", preset="refused.yaml")
    assert (code, lines) == (2, []) and error.count("\n") == 1
    assert error.startswith("psa-understand: error: ") and message in error and "allowed: " in error


def test_a_processor_that_takes_no_videos(understand, monkeypatch):
    def of_images(self, text, images=None, return_tensors=None):
        pass

    monkeypatch.setattr(ToyProcessor, "__call__", of_images)
    code, lines, error = understand()
    (line,) = [line for line in error.splitlines() if line.startswith("psa-understand")]  # after a bar of progress
    assert code == 2 and not lines and error.endswith(f"{line}\n")
    assert line.startswith("psa-understand: error: ToyProcessor: makes no prompt of a video: ") and "videos" in line


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device gpu: not a device for this; allowed: auto, cpu, cuda or cuda:N"),
        ("mps", "device mps: not a device for this"),
        ("cuda:9", "device cuda:9: this machine has 0 CUDA devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_weights_are_read(understand, monkeypatch, device, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psa_transformers.ask.AutoModelForImageTextToText.from_pretrained", None)
    code, lines, error = understand("--device", device)
    assert (code, lines) == (2, []) and error.startswith(f"psa-understand: error: {message}") and error.count("\n") == 1


def test_it_says_that_it_was_interrupted(understand, monkeypatch):
    # What SIGINT calls, for a shell's background jobs ignore the signal itself.
    interrupt = signal.default_int_handler
    monkeypatch.setattr("psa_transformers.ask.read_frames", lambda *_: interrupt(signal.SIGINT, None))
    assert understand() == (130, [], "psa-understand: error: interrupted\n")


def test_it_shows_its_version(capsys):
    assert run(["--version"]) == 0
    assert re.match(r"psa-diffusers \S+, python 3\.\d+\.\d+, torch ", capsys.readouterr().out)


def test_an_option_that_is_not_there(understand):
    code, _, error = understand("--nonsense")
    assert code == 2 and error.count("\n") == 1 and "--nonsense" in error


def test_frames_are_spaced_evenly(folder):
    frames = read_frames(folder / "film.mp4", 5)
    assert frames.indices == [0, 3, 6, 8, 11] and frames.pixels.shape == (5, 64, 64, 3)
    assert frames.metadata()["duration"] == pytest.approx(1.5)
    assert len(read_frames(folder / "film.mp4", 100).pixels) == 12
    with pytest.raises(QuestionError, match="no such file"):
        read_frames(folder, 5)
