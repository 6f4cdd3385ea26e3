"""Other weights in the same folder are another model; what else comes and goes there is not."""

import os
import shutil

import pytest

from psa_diffusers.checkpoints.digest import folder_digest
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.errors import InputError
from psa_diffusers.runs.plan import make_plan
from psa_testing.tiny_runs import carry_out

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved / "wan", tmp_path / "model")  # with its times


def digest(folder):
    return folder_digest(resolve_model(str(folder)))


def test_only_what_a_component_loads_counts(copied):
    before = digest(copied)
    assert before is not None and len(before) == 32
    for extra in ("psa-output/out.mp4", "mine.yaml", ".cache/lock", "transformer/.lock", "vae/__pycache__/a.pyc"):
        (copied / extra).parent.mkdir(parents=True, exist_ok=True)
        (copied / extra).write_text("x")
    (copied / "vae" / "gone.safetensors").symlink_to("nowhere")
    assert digest(copied) == before
    content = (copied / WEIGHTS).read_bytes()
    changed = bytearray(content)
    changed[-1] ^= 1
    (copied / WEIGHTS).write_bytes(changed)
    os.utime(copied / WEIGHTS, (1, 1))
    assert len({before, digest(copied)}) == 2


def test_links_are_followed_to_the_weights(copied, tmp_path):
    real = shutil.move(copied / "transformer", tmp_path / "elsewhere")
    (copied / "transformer").symlink_to(real)
    before = digest(copied)
    os.utime(tmp_path / "elsewhere" / "diffusion_pytorch_model.safetensors", (1, 1))
    assert digest(copied) != before


def test_new_weights_in_the_same_folder_are_another_run(copied, ask):
    request = ask("a cat", model=str(copied))
    carry_out(request)
    assert carry_out(request)["kept"] == 1
    os.utime(copied / WEIGHTS, (1, 1))
    with pytest.raises(InputError, match=r'holds another run \(source_digest was "\w+" and is now "\w+"\)'):
        carry_out(request)


def test_the_demo_has_none(ask):
    """Its files are the package's, whose version is another matter."""
    settings = make_plan(ask("a cat", model="demo", height=None, width=None, frames=None, preset="dense")).settings
    assert settings.source_digest is None and "source_digest" not in settings.to_dict()
