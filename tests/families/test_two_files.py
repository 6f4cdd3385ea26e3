"""A new family touches two files: everything that tests every family picks it up from these."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAMILY = """
from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.wan import Wan


class MadeUp(Wan):
    name = "Made Up"
    transformers = ("MadeUpTransformer3DModel",)


PIPELINES = {"MadeUpPipeline": PipelineKind()}
CARDS = (ModelCard(name="made-up", hub_id="someone/made-up", about="made up", pipeline="MadeUpPipeline"),)
"""
ITS_TESTS = """
from dataclasses import replace

from psa_diffusers.families.made_up import MadeUp
from psa_testing.cases import JointText
from psa_testing.families import wan

CASE = replace(wan.TESTS.cases["wan"], text=JointText(16, (16,)))
TESTS = replace(
    wan.TESTS,
    family=MadeUp,
    cases={"made-up": CASE},
    networks={"MadeUpTransformer3DModel": wan.TESTS.networks["WanTransformer3DModel"]},
    published=(replace(wan.TESTS.published[0], checkpoint="someone/made-up", model="MadeUpTransformer3DModel"),),
    parallel={"made-up": wan.TESTS.parallel["wan"]},
    saved={"made-up": wan.TESTS.saved["wan-vace"]},
    masks_padding=True,
)
"""
# Some of the tests that every family must pass, of every file that has any.
TESTS = [
    "tests/checkpoints/test_model_aliases.py::test_every_alias_passes_its_own_checks",
    "tests/families/test_families.py::test_a_mask_of_video_tokens_is_dense",
    "tests/families/test_families.py::test_a_run_with_dense_steps_only_is_bit_identical",
    "tests/families/test_families.py::test_keeping_everything_equals_the_stock_pipeline_to_rounding",
    "tests/families/test_families.py::test_set_attn_processor_is_enough",
    "tests/families/test_families.py::test_sparse_runs_differ_repeat_and_are_undone",
    "tests/families/test_published_models.py::test_a_published_configuration",
    "tests/families/test_stock_processors.py::test_those_of_every_pipeline_are_imitated",
    "tests/patch/test_changed_pipelines.py::test_bfloat16",
    "tests/patch/test_changed_pipelines.py::test_fused_projections",
    "tests/patch/test_changed_pipelines.py::test_group_offload",
    "tests/patch/test_changed_pipelines.py::test_layerwise_casting",
    "tests/patch/test_changed_pipelines.py::test_lora",
    "tests/patch/test_parallel.py::test_several_ranks_equal_one_process",
    "tests/patch/test_text.py::test_a_text_token_counts",
    "tests/patch/test_text.py::test_padding_counts_for_nothing",
    "tests/patch/test_text.py::test_samples_with_different_text_are_what_each_is_alone",
    "tests/patch/test_text.py::test_text_is_exact_and_video_alone_is_pooled",
    "tests/runs/test_generate_families.py::test_a_saved_pipeline_runs",
    "tests/scripts/test_check_blocks.py::test_inputs_at_full_size_are_what_the_transformer_takes",
]


@pytest.fixture
def checkout(tmp_path):
    """The packages in a folder of their own, with two files more."""
    for package in ("psa_diffusers", "psa_testing", "configs"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (tmp_path / "psa_diffusers/families/made_up.py").write_text(FAMILY)
    (tmp_path / "psa_testing/families/made_up.py").write_text(ITS_TESTS)
    return tmp_path


def test_two_files_are_a_family(checkout):
    path = " ".join(str(folder) for folder in (checkout, ROOT / "kernels", ROOT / "scripts"))
    files = sorted({test.split("::")[0] for test in TESTS})
    collect = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={path}", *files]
    found = subprocess.run([sys.executable, *collect], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    collected = {line.split("[")[0] for line in found.stdout.splitlines() if "[made-up" in line}
    assert set(TESTS) <= collected, set(TESTS) - collected
    code = "from psa_diffusers.checkpoints.listing import listing; print(listing())"
    listed = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert "someone/made-up" in listed.stdout, listed.stderr
