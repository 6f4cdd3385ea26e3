"""Nothing executes from a preset, a prompt file or a model's folder, and prompts stay inside the output folder.

Elsewhere: pickled weights are refused (test_pipelines.py), and the report escapes what it shows (test_report.py).
"""

import json
import re
from pathlib import Path

import pytest

import psa_diffusers
from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.errors import InputError
from psa_diffusers.runs.folder import REPORT_PARTS, RunFolder
from psa_diffusers.runs.prompts import read_prompts, slug
from psa_presets import PresetError, load_preset
from psa_testing.tiny_pipelines import tiny_wan

ROOT = Path(psa_diffusers.__file__).parents[1]
PACKAGES = [ROOT / "psa_diffusers", ROOT / "psa_presets", ROOT / "psa_transformers", ROOT / "kernels" / "psa_kernels"]
SOURCES = [path for package in PACKAGES for path in package.rglob("*.py")]
# What would run code from a file or a string, or load what can.
FORBIDDEN = [
    r"trust_remote_code",
    r"\bpickle\b",
    r"\btorch\.load\(",
    r"weights_only\s*=\s*False",
    r"yaml\.(load|unsafe_load|full_load)\(",
    r"(?<![.\w])(eval|exec)\(",
    r"\bos\.system\(",
    r"shell\s*=\s*True",
    r"custom_pipeline",
]


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_the_packages_do_not_use(pattern):
    assert len(SOURCES) > 50
    found = [str(path) for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"))]
    assert not found


TOUCH = "__import__('pathlib').Path({path!r}).touch()"


@pytest.mark.parametrize(
    "content",
    [
        "name: !!python/object/apply:os.system ['touch {path}']",
        "name: !!python/object/new:pathlib.Path.touch ['{path}']",
        "name: !!python/name:os.system",
        "levels: !!python/tuple [1, 2]",
        "name: {code}",
        "source: '$(touch {path})'\nname: '`touch {path}`'",
    ],
)
def test_a_preset_executes_nothing(content, tmp_path):
    path = tmp_path / "touched"
    (tmp_path / "mine.yaml").write_text(content.replace("{code}", TOUCH).replace("{path}", str(path)))
    with pytest.raises(PresetError):
        load_preset(tmp_path / "mine.yaml")
    assert not path.exists()


def test_a_prompt_is_only_text(tmp_path):
    path = tmp_path / "touched"
    lines = [
        f"$(touch {path})",
        f"`touch {path}`",
        "{{ 7 * 7 }}",
        "{0.__class__}",
        "%s%n",
        TOUCH.format(path=str(path)),
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    assert list(read_prompts((str(tmp_path / "prompts.txt"),))) == lines
    assert not path.exists()


CODE = "from pathlib import Path\nPath({path!r}).touch()\n"


@pytest.mark.parametrize("where", ["transformer", "scheduler", "tokenizer", "vae", "."])
def test_code_in_a_model_s_folder_is_not_run(where, tmp_path):
    """As a repository that brings its own classes has it: modules beside the weights, named in the configuration."""
    folder, touched = tmp_path / "model", tmp_path / "touched"
    tiny_wan(num_layers=1).save_pretrained(folder)
    for name in ("modeling.py", "pipeline.py", "__init__.py", "configuration.py"):
        (folder / where / name).write_text(CODE.format(path=str(touched)))
    for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
        file = folder / where / name
        if file.exists():
            content = json.loads(file.read_text())
            content["auto_map"] = {"AutoModel": "modeling.Model", "AutoTokenizer": ["modeling.Model", None]}
            file.write_text(json.dumps(content))
    load_pipeline(resolve_model(str(folder)), dtype="float32", device="cpu", offload="none")
    assert not touched.exists()


def test_a_model_that_needs_its_own_code_is_refused(tmp_path):
    folder, touched = tmp_path / "model", tmp_path / "touched"
    tiny_wan(num_layers=1).save_pretrained(folder)
    (folder / "modeling.py").write_text(CODE.format(path=str(touched)))
    index = json.loads((folder / "model_index.json").read_text())
    for changes in ({"_class_name": ["modeling", "Pipeline"]}, {"_class_name": "os.system"}):
        (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
        with pytest.raises(InputError, match="supported are"):
            resolve_model(str(folder))
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": ["modeling", "Model"]}))
    with pytest.raises(Exception):  # noqa: B017 - diffusers says it in its own words
        load_pipeline(resolve_model(str(folder)), dtype="float32", device="cpu", offload="none")
    assert not touched.exists()


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "a/../../b",
    "..\\..\\windows",
    "C:\\x",
    "nul",
    "con.txt",
    "a\x00b",
    "~root",
    ".hidden",
    "-rf",
    "a" * 500,
    "\u202egnp.exe",
    "\u2215etc\u2215passwd",
    "\uff0e\uff0e\uff0f",
    "...",
    "a\nb",
    "run.json",
    "report.html",
]


def test_prompts_stay_in_the_output_folder_and_do_not_clash(tmp_path):
    prompts = (*HOSTILE, *HOSTILE)
    folder = RunFolder(tmp_path / "out", {}, prompts)
    folder.check(overwrite=False)
    folder.begin()
    for index in range(len(prompts)):
        with folder.writing(index) as path:
            assert path.resolve().parent == (tmp_path / "out").resolve()
            (path / "report.json").write_text(json.dumps({part: kind() for part, kind in REPORT_PARTS.items()}))
    assert len({name.casefold() for name in folder.names}) == len(prompts)
    assert not folder.missing() and [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in folder.names:
        assert re.fullmatch(r"\d{4}-[a-z0-9][a-z0-9.-]*", name) and ".." not in name and not name.endswith(".")


def test_slugs_of_hostile_prompts_are_words():
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", slug(prompt)) for prompt in HOSTILE)
