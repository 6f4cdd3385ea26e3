"""Prompts from the command line and from files, and the names of their folders."""

import pytest

from psa_diffusers.errors import InputError
from psa_diffusers.runs.prompts import read_prompts, slug


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# a comment\n\n  a cat  \n# another\na dog, at night\r\n", encoding="utf-8")
    assert read_prompts(("first", str(path), "last")) == ("first", "a cat", "a dog, at night", "last")
    path.write_text("# only a comment\n\n")
    with pytest.raises(InputError, match="no prompt in it"):
        read_prompts((str(path),))
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_prompts((str(path),))
    assert len(read_prompts(("word " * 200,))[0]) == 999  # longer than a file name may be


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("🎉🎉", "prompt"),
        ("", "prompt"),
        ("..", "prompt"),
        ("Ein Kätzchen, 3.5 m/s!", "ein-katzchen-3.5-m-s"),
        ("wan2.2-14b", "wan2.2-14b"),
        ("一只猫 cat", "cat"),
        ("<script>alert(1)</script>", "script-alert-1-script"),
        ("con\x00\n\ttrol", "con-trol"),
    ],
)
def test_slugs_are_safe(prompt, expected):
    assert slug(prompt) == expected


def test_a_long_slug_is_cut():
    assert len(slug("x" * 300)) <= 48
    assert not slug("ab " * 100).endswith("-")
