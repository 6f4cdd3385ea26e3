"""Prompts from the command line and from files, and the names of their folders."""

import io
import os
import threading

import pytest

from psa_diffusers.errors import InputError
from psa_diffusers.runs import prompts
from psa_diffusers.runs.prompts import only_words, read_prompts, slug


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


def stdin_of(monkeypatch, content: bytes, terminal: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
    stdin.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", stdin)


def refused(*arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts(arguments)
    message = str(caught.value)
    assert "\n" not in message
    message.encode()  # can be written anywhere
    return message


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "prompts"
    odd = ["a\x0bb", "c\x0cd", "e\x1cf\x1dg\x1eh", "i\x85j", "k\u2028l\u2029m", "n\ro"]
    path.write_bytes("\r\n".join(odd).encode())
    assert read_prompts((str(path),)) == tuple(odd)


@pytest.mark.parametrize(
    "words",
    [
        "a cat/dog hybrid",
        "a sign that says and/or",
        "cat",
        "U.S.A.",
        "pi is 3.14",
        "3.5",
        "line one\nline two",
        "...",
        "w" * 300,
        "a fox -> a hen; 24 fps, f/1.8",
        "a robot (v2.0) walks. It stops",
    ],
)
def test_words_are_prompts(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_prompts((words,)) == (words,)


@pytest.mark.parametrize(
    "name",
    [
        *("prompts.csv", "prompts.json", "p.JSONL", "notes.md", "p.yaml", "p.tsv", "my prompts.txt", " p.txt"),
        *(
            "clip.mp4",
            "cat.jpeg",
            "prompts.list",
            "prompts*.txt",
            "cat/dog",
            "and/or",
            "/no/such",
            "./p",
            "../p",
            "~/p",
        ),
        *("C:\\prompts\\day1", "C:\\p.txt", "day\\one", "https://example.com/p", "/dev/fd/987", "x/" + "w" * 300),
    ],
)
def test_what_looks_like_a_file_must_be_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    message = refused("a cat", name)
    assert message.startswith(f"prompt file {name}"[:60]) and "no such file; if these are the words" in message


def test_names_that_do_not_look_like_one_are_read_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cats").write_text("a cat\n")
    (tmp_path / "my prompts.txt").write_text("a dog\n")
    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "one.list").write_text("a fox\nand/or\n-\nx.txt\n")
    read = read_prompts(("cats", "my prompts.txt", "day/one.list", "./cats", "~/cats", str(tmp_path / "cats")))
    assert read == ("a cat", "a dog", "a fox", "and/or", "-", "x.txt", "a cat", "a cat", "a cat")


@pytest.mark.parametrize("name", ["day", "day/", ".", "..", "/", "~"])
def test_a_folder_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "day").mkdir()
    assert refused(name).startswith(f"prompt file {name}: is a folder; give a text file with one prompt a line")


@pytest.mark.parametrize("ending", [".csv", ".CSV", ".tsv", ".json", ".jsonl", ".yaml", ".md"])
def test_data_is_not_read_line_by_line(ending, tmp_path):
    (tmp_path / f"prompts{ending}").write_text("prompt,seed\na cat,3\n")
    message = refused(str(tmp_path / f"prompts{ending}"))
    assert f"{ending} files are not read; give a text file with one prompt a line" in message


def test_what_is_no_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "video").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    assert refused("video") == "prompt file video: not text (null byte)"
    (tmp_path / "wide.txt").write_bytes("a cat".encode("utf-16"))
    assert refused("wide.txt") == "prompt file wide.txt: not UTF-8 text (byte 0)"
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert refused("gone").startswith("prompt file gone: no such file")
    assert refused("/dev/null").startswith("prompt file /dev/null: is a device or a terminal")
    assert refused("/dev/zero").startswith("prompt file /dev/zero: is a device or a terminal")
    assert refused("caf\udce9 au lait") == r"prompt caf\udce9 au lait: not UTF-8 text"
    assert refused("caf\udce9.txt").startswith(r"prompt file caf\udce9.txt: no such file")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(prompts.MAX_BYTES + 1)
    assert refused("huge").startswith("prompt file huge: more than 64 MiB")


def test_a_pipe_is_read(tmp_path):
    ends = os.pipe()
    os.write(ends[1], b"a cat\n# no\na dog")
    os.close(ends[1])
    assert read_prompts(("first", f"/dev/fd/{ends[0]}")) == ("first", "a cat", "a dog")
    os.close(ends[0])
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a fox\n",))
    writer.start()
    assert read_prompts((str(tmp_path / "pipe"),)) == ("a fox",)
    writer.join()


def test_stdin_is_read(monkeypatch):
    stdin_of(monkeypatch, b"\xef\xbb\xbfa cat\r\n\n# no\n-\n")
    assert read_prompts(("-", "last")) == ("a cat", "-", "last")
    stdin_of(monkeypatch, b"a cat\n")
    assert refused("-", "-") == "prompt file -: no prompt in it; write one a line ('#' starts a comment)"
    stdin_of(monkeypatch, b"")
    assert refused("-").startswith("prompt file -: no prompt in it")
    stdin_of(monkeypatch, b"caf\xe9")
    assert refused("-") == "prompt file -: not UTF-8 text (byte 3)"
    stdin_of(monkeypatch, b"a cat\n", terminal=True)
    assert refused("-").startswith("prompt file -: stdin is a terminal or closed")
    monkeypatch.setattr("sys.stdin", None)
    assert refused("-").startswith("prompt file -: stdin is a terminal or closed")


def test_launched_processes_do_not_share_a_pipe(monkeypatch, tmp_path):
    """Each would get some of the lines, and none of them all."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    stdin_of(monkeypatch, b"a cat\n")
    assert refused("-") == "prompt file -: 2 processes were launched and cannot all read one pipe; give a file"
    os.mkfifo(tmp_path / "pipe")
    assert "2 processes were launched" in refused(str(tmp_path / "pipe"))


def test_options_of_words_alone_take_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("blurry")
    for name in ("bad", "bad.txt", "-"):
        with pytest.raises(InputError, match=f"--negative-prompt {name}: takes words"):
            only_words("--negative-prompt", name)
    (tmp_path / "blurry").mkdir()
    for text in ("", "blurry", "text/watermark", "long " * 100, "text, e.g"):
        assert only_words("--negative-prompt", text) == text


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
