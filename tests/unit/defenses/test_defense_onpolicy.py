"""What on-policy answers are kept under for later runs, and which are not kept."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tiny import byte_tokenizer

from rlsafe.config import run_from_tree
from rlsafe.data import Stream
from rlsafe.defenses.onpolicy import Answered, InterleavingOnPolicy
from rlsafe.types import SamplingParams

ROW = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def key(tmp_path, monkeypatch):
    """The key of a row's answers under a judge."""
    monkeypatch.setattr("rlsafe.policy.digest.weights_digest", lambda policy: "weights")
    defense = InterleavingOnPolicy()
    defense.tokenizer, defense.seed, defense.params = byte_tokenizer(), 0, SamplingParams()

    def of(row=ROW, **evaluate):
        config = run_from_tree({"model": {"name": "x"}, "evaluate": evaluate})
        return defense._key([row], SimpleNamespace(policy=None, config=config))

    return of


def test_a_judges_file_counts_by_what_it_says(key, tmp_path):
    one, other = tmp_path / "judge.yaml", tmp_path / "copy.yaml"
    one.write_text("kind: openai\nmodel: large\n")
    other.write_text(one.read_text())
    first = key(judge=str(one))
    assert first == key(judge=str(other)) != key(judge="static")
    of_a_set = key(judge="static", judges={"indomain": str(one)})
    one.write_text("kind: openai\nmodel: small\n")
    assert len({first, of_a_set, key(judge=str(one)), key(judge="static", judges={"indomain": str(one)})}) == 4


@pytest.mark.parametrize(
    "column", [{"domain": "medical"}, {"judge_prompts": {"aligned": "Is {answer} kind?"}}], ids=str
)
def test_columns_that_the_judge_reads_are_part_of_the_key(key, column):
    assert (
        key(judge="static") == key({**ROW, "_source": "a:1"}, judge="static") != key({**ROW, **column}, judge="static")
    )


def test_answers_that_the_judge_did_not_reach_are_judged_again_by_the_next_run(tmp_path):
    """Else an outage would choose the rows of every later run of the seed."""
    scored = Answered("yes", "stop", "scored", 90.0, 90.0)
    lost = Answered("no", "stop", "unscored", None, None)
    defense, notes, file = InterleavingOnPolicy(), [], tmp_path / "answers.json"
    context = SimpleNamespace(log=notes.append)
    assert defense._save(file, [scored, lost], context) == [scored, lost] and not file.exists()
    assert "not saved for later runs: 1 of 2 got no judgement" in notes[0]
    assert defense._save(file, [scored], context) == [scored] and len(json.loads(file.read_text())) == 1


def test_a_run_goes_on_with_the_rows_that_it_began_with_though_the_judge_reaches_more_now():
    """After an outage nothing is kept for other runs, so the checkpoint holds the rows."""
    rows = [{"messages": [*ROW["messages"], {"role": "assistant", "content": str(i)}]} for i in range(3)]
    first, second = InterleavingOnPolicy(), InterleavingOnPolicy()
    first.stream, first.unsaved = Stream(rows[:2], 0, "defense/x"), rows[:2]
    drawn = first.stream.take(1)
    state = json.loads(json.dumps(first.state_dict()))
    second.stream = Stream(rows, 0, "defense/x")
    second.load_state_dict(state)
    assert second.stream.take(1) == first.stream.take(1) != drawn and second.unsaved == rows[:2]
