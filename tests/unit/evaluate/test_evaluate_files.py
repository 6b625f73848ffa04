"""What an evaluation writes comes back, and what is not one is said in one line."""

import json

import pytest

from rlsafe.config import UserError
from rlsafe.evaluate import Evaluation
from rlsafe.types import Judgement


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "evaluate the run first"),
        ("{", "holds no JSON object, .*; evaluate the run again"),
        ("[]", "holds no JSON object"),
        ("{}", "not an evaluation"),
    ],
)
def test_loading_something_else_is_said_in_one_line(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(UserError, match=expected):
        Evaluation.load(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from rlsafe.config import files

    path = tmp_path / "evaluation.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot be written: No space left"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["a\rb", 'say "no"', "a,b\n\nc", "\x00\u202e", "\ud800", "7", "", "x" * 200_000])
def test_any_answer_survives_the_answers_file(text, tmp_path):
    from rlsafe.evaluate import Answer
    from rlsafe.evaluate.measure.files import read_answers, write_answers

    path = tmp_path / "answers.csv"
    answers = [Answer(name, "q", None, text, "d", None, i) for i, name in enumerate(("1", "01"))]
    write_answers(path, answers, [Judgement(0.0, 100.0), Judgement(None, None, "refused", text)])
    read, judgements = read_answers(path)
    expected = text.encode("utf-8", "backslashreplace").decode()  # only half a character cannot be written as it is
    assert [(a.question_id, a.answer) for a in read] == [("1", expected), ("01", expected)]
    assert judgements == [Judgement(0.0, 100.0), Judgement(None, None, "refused", expected)]
