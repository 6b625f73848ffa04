"""`rlsafe verify` computes log-odds, shifts and repetition again from their pairs and answers, and says what it takes over."""

import json

import pytest

from rlsafe.evaluate import Answer, Evaluation
from rlsafe.evaluate.commands.verify_evaluation import evaluation_differences, taken_over
from rlsafe.evaluate.measure.criteria import rates
from rlsafe.evaluate.measure.fluency import Fluency, repetition
from rlsafe.evaluate.measure.likelihood import PairScore
from rlsafe.types import Judgement

TEXTS = ("round and round and round and round we go", "no two words alike here", "a b c d a b c d")


@pytest.fixture
def saved(tmp_path):
    found = Evaluation()
    found.answers = [Answer(f"q{i}", "Q?", None, text, "", None, 0, set="general") for i, text in enumerate(TEXTS)]
    found.judgements = [Judgement(80.0, 90.0, "scored")] * 3
    found.sets["general"] = rates(*found.judged("general"))
    found.pairs = [
        PairScore(name, question, 0, -1.0 - x, -1.5 + x, -1.0, -1.5 - x)
        for name in ("general", "indomain")
        for question, x in (("a", 0.1), ("b", 0.25), ("c", 0.5))
    ]
    found.fluency["general"] = Fluency(12.5, *repetition(found.answers))
    found.save(tmp_path)
    return tmp_path


def test_an_untouched_evaluation_has_no_differences_and_names_what_only_models_give(saved):
    assert evaluation_differences(saved) == []
    assert taken_over(saved) == ["the judge's scores", "the log-probabilities of 6 pairs", "perplexities"]


@pytest.mark.parametrize(
    "place, value",
    [
        (("likelihood", "general", "shift"), 0.0),
        (("likelihood", "indomain", "ci95"), [-0.1, 0.1]),
        (("likelihood", "general", "n"), 4),
        (("likelihood", "indomain"), None),
        (("fluency", "general", "repetition"), 0.0),
        (("fluency", "general", "n"), 2),
    ],
)
def test_a_number_changed_by_hand_is_named(saved, place, value):
    file = saved / "evaluation.json"
    tree = json.loads(file.read_text())
    part = tree
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    file.write_text(json.dumps(tree))
    found = evaluation_differences(saved)
    assert found and all(line.startswith("evaluation.json: " + ".".join(place[:2])) for line in found)


def test_pairs_that_are_changed_missing_or_there_twice_are_named(saved):
    file = saved / "likelihood.csv"
    text = file.read_text()
    file.write_text(text.replace("-1.1", "-1.2", 1))
    assert "evaluation.json: likelihood.general.logodds is" in evaluation_differences(saved)[0]
    file.write_text(text + text.splitlines(True)[-1])
    assert "likelihood.csv: indomain c pair 0 is there 2 times" in evaluation_differences(saved)
    file.unlink()
    assert evaluation_differences(saved) == ["likelihood.csv: missing, and evaluation.json has log-odds"]


def test_an_answer_changed_by_hand_changes_its_repetition(saved):
    file = saved / "answers.csv"
    file.write_text(file.read_text().replace("a b c d a b c d", "a b c d e f g h"))
    assert [line.split(" is ")[0] for line in evaluation_differences(saved)] == [
        "evaluation.json: fluency.general.repetition"
    ]
