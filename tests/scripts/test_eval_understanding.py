"""Multiple choice about videos on a tiny random model and generated videos: what is asked, kept, refused, summed up."""

from __future__ import annotations

import json
from pathlib import Path

import eval_understanding
import numpy as np
import pytest
import torch
from kept_rows import Record
from transformers import AutoProcessor
from understanding_eval.answers import best, letter_tokens
from understanding_eval.questions import read_questions

from psa_diffusers.errors import InputError
from psa_diffusers.report.video import write_video
from psa_testing.tiny_language_models import tiny
from psa_testing.toy_processor import ToyProcessor

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSE = "block: {query: 32, key: 16}\nrule: budget\ndensity: 0.3\n"
FULL = "block: {query: 32, key: 16}\nlevels: [1]\nthresholds: [1.0]\n"
LONG = "What happens? " * 40  # the last tokens are text in any case: with a short question the video ends before them


def question(number: int, **changes: object) -> dict[str, object]:
    about = {"video": f"films/{number % 2}.mp4", "question": LONG, "options": ["A. a dog", "B. a cat", "C. rain"]}
    return {"id": f"q{number}", **about, "answer": "ABC"[number % 3], **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("benchmark")
    (made / "films").mkdir()
    for number in range(2):
        frames = np.random.default_rng(number).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
        write_video(made / "films" / f"{number}.mp4", frames, 8)
    (made / "films" / "words.mp4").write_text("no video at all")
    tiny("qwen2_5_vl")[0].save_pretrained(made / "vlm")
    (made / "full.yaml").write_text(FULL)
    (made / "sparse.yaml").write_text(SPARSE)
    return made


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch):
    """Writes questions and runs the script; the document that it wrote."""
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda _: ToyProcessor())

    def start(questions: list[dict[str, object]], *given: str, preset: str = "full.yaml"):
        (folder / "questions.json").write_text(json.dumps(questions))
        output = tmp_path / "out.json"
        named = ("--model", str(folder / "vlm"), "--benchmark", str(folder), "--output", str(output))
        always = ("--preset", str(folder / preset), "--num-frames", "6", "--min-tokens", "64", "--device", "cpu")
        eval_understanding.main([*named, *always, *given])
        return json.loads(output.read_text())

    return start


def test_with_everything_kept_both_answer_alike(evaluate):
    written = evaluate([question(0), question(1), question(2)])
    summary, rows = written["summary"], written["rows"]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2"]
    assert summary["agreement"] == 1 and summary["difference"] == 0 and summary["density"] == 1
    assert summary["accuracy"]["dense"] == summary["accuracy"]["sparse"]
    right = [row["dense"]["letter"] == row["answer"] for row in rows]
    assert summary["accuracy"]["dense"] == pytest.approx(sum(right) / 3, abs=1e-4)
    assert summary["not_sparse"] == 0 and not summary["fallbacks"] and summary["prefill_seconds"]["sparse"] > 0


def test_a_run_goes_on_where_it_was_stopped(evaluate, tmp_path, monkeypatch):
    asked: list[str] = []
    answer = eval_understanding.answer

    def once(model, processor, put, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(put.id)
        return answer(model, processor, put, *rest)

    questions = [question(number) for number in range(4)]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(eval_understanding, "answer", once)
        evaluate(questions, preset="sparse.yaml")
    kept = tmp_path / "out.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    kept.write_text("".join(lines) + '{"id": "q2", "ans')  # killed while it wrote
    written = evaluate(questions, preset="sparse.yaml")
    assert [row["id"] for row in written["rows"]] == ["q0", "q1", "q2", "q3"]
    after = kept.read_text().splitlines(keepends=True)
    assert after[:3] == lines and len(after) == 5
    assert 0.3 < written["summary"]["density"] < 0.95 and written["summary"]["difference_ci"] is not None
    with pytest.raises(SystemExit, match=r"was begun with dense_last=512, not 100; remove it"):
        evaluate(questions, "--dense-last", "100", preset="sparse.yaml")
    with pytest.raises(SystemExit, match="was begun with preset="):
        evaluate(questions)
    with pytest.raises(SystemExit, match="was begun with questions_sha256="):
        evaluate(questions[:2], preset="sparse.yaml")
    assert kept.read_text().splitlines(keepends=True) == after


def test_a_file_that_is_no_video_is_told_and_left_out(evaluate):
    written = evaluate([question(0, video="films/words.mp4"), question(1)])
    assert written["summary"]["unreadable"] == 1 and written["summary"]["questions"] == 1
    assert "no video that can be read" in written["rows"][0]["error"]


def test_a_short_prompt_is_counted_as_not_sparse(evaluate):
    written = evaluate([question(0)], "--min-tokens", "8192")
    assert written["summary"]["not_sparse"] == 1 and written["summary"]["density"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "D"}, r"question 1: answer='D'; expected one of A, B, C"),
        ({"options": ["one"]}, r"question 1: options=\['one'\]; expected a list of 2 to 26 texts"),
        ({"video": "films/9.mp4"}, r"question 1: video='films/9.mp4'; expected a file"),
        ({"question": ""}, r"question 1: question=''; expected text"),
        ({"id": "q1"}, r"id 'q1' stands there twice"),
    ],
)
def test_what_is_wrong_with_a_question_is_told_in_one_line(folder, changes, message):
    (folder / "questions.json").write_text(json.dumps([question(0, **changes), question(1)]))
    with pytest.raises(InputError, match=message) as raised:
        read_questions(folder)
    assert "\n" not in str(raised.value)


def test_letters_are_not_said_twice(folder):
    (folder / "questions.json").write_text(
        json.dumps([question(0), question(1, options=["A dog", "Bread"], answer="A")])
    )
    (published, plain), _ = read_questions(folder)
    assert "\nA. a dog\nB. a cat\nC. rain\n" in published.text()
    assert "\nA. A dog\nB. Bread\n" in plain.text() and plain.letters == "AB"


def test_the_most_likely_letter_is_chosen_with_or_without_a_space():
    class Tokens:
        tokenizer = property(lambda self: self)

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return {"A": [5], " A": [6], "B": [7], " B": [8, 9], "C": [1, 2], " C": [3, 4]}[text]

    assert letter_tokens(Tokens(), "AB") == [[5, 6], [7]]
    with pytest.raises(InputError, match="letter 'C': the model's tokenizer has no token"):
        letter_tokens(Tokens(), "ABC")
    logits = torch.zeros(10)
    logits[9] = 5.0  # no letter
    logits[6] = 1.0
    assert best(logits, [[5, 6], [7]]) == 0
    logits[7] = 2.0
    assert best(logits, [[5, 6], [7]]) == 1


def test_two_processes_do_not_write_one_file(tmp_path):
    with (
        Record(tmp_path / "rows.jsonl", {}),
        pytest.raises(InputError, match="another process writes it"),
        Record(tmp_path / "rows.jsonl", {}),
    ):
        pass
