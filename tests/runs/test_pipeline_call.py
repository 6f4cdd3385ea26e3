"""What is wrong with a video, or denser than asked for, is told in the summary, the report and on stderr."""

import torch

from psa_testing.spies import spoil_sparse
from psa_testing.tiny_runs import FRAMES, LAYERS, STEPS, carry_out, edit_pipeline


def test_black_frames_are_reported(ask, tmp_path, monkeypatch, capsys):
    def blacken(pipe):
        decode = pipe.vae.decode
        pipe.vae.decode = lambda *arguments, **settings: (torch.full_like(decode(*arguments, **settings)[0], -1.0),)

    edit_pipeline(monkeypatch, blacken)
    summary = carry_out(ask("a cat", preset="dense"))
    assert summary["prompts"][0]["warnings"] == [f"dense: {FRAMES} of {FRAMES} frames are all black"]
    assert "all black" in (tmp_path / "out" / "report.html").read_text()
    assert "warning: dense, 'a cat': 5 of 5 frames are all black" in capsys.readouterr().err


def test_latents_that_are_not_finite_are_reported(ask, monkeypatch):
    def spoil(pipe):
        pipe.transformer.register_forward_hook(lambda module, arguments, output: (output[0] * float("nan"),))

    edit_pipeline(monkeypatch, spoil)
    summary = carry_out(ask("a cat", compare=True))
    assert "dense: the latents hold values that are not finite" in summary["prompts"][0]["warnings"]
    assert summary["prompts"][0]["psnr"] is None


def test_sparse_attention_that_is_not_finite_is_reported(ask, monkeypatch, tmp_path, recwarn):
    spoil_sparse(monkeypatch, layers=("blocks.1",), steps=(2, 3))
    summary = carry_out(ask("a cat"))
    told = summary["prompts"][0]["warnings"]
    assert "small: blocks.1: sparse attention was not finite at step 3, 4; dense there" in told
    assert any(line.startswith("small: 4 attention calls ran dense: its sparse output held values") for line in told)
    assert "sparse attention was not finite at step 3, 4" in (tmp_path / "out" / "report.html").read_text()
    assert not [entry for entry in recwarn if "finite" in str(entry.message)]


def test_a_video_too_short_for_sparse_attention_says_so_once(ask, recwarn):
    summary = carry_out(ask("a cat", preset="psa-3"))
    assert summary["prompts"][0]["density"] == 1.0
    throughout, reason = summary["prompts"][0]["warnings"]
    assert throughout == "psa-3: attention was dense throughout"
    calls = (STEPS - 1) * LAYERS * 2  # both guidance branches
    assert reason.startswith(f"psa-3: {calls} attention calls ran dense: the sequence of 32 tokens is shorter")
    assert not [entry for entry in recwarn if "dense" in str(entry.message)]
