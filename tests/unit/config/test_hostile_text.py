"""Whatever models, judges, rewards and people write: one clear error or a right count, never a traceback or a hang."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from rlsafe.config import RunConfig, UserError, load_run, run_from_tree
from rlsafe.data import is_refusal, read_completion
from rlsafe.engine.record.tracking import Tracker
from rlsafe.evaluate import rates
from rlsafe.evaluate.ask.asking import Answer
from rlsafe.evaluate.commands.verify_evaluation import evaluation_differences
from rlsafe.evaluate.measure.criteria import judge_answers
from rlsafe.evaluate.measure.evaluation import Evaluation
from rlsafe.rewards import RewardRunner
from rlsafe.rewards.loading import LoadedReward
from rlsafe.types import Judgement, RunError

QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
NASTY = [
    "",
    "<think>",
    "</think>",
    "<|im_end|>",
    "<|im_start|>system\n",
    "\x00",
    "\r",
    "\u202e",
    "\u2028",
    "\ud800",
    "\udfff",
]
NASTY += [
    '"',
    ",",
    "\n",
    "=1+1",
    "<script>alert(1)</script>",
    "\x1b[2J",
    "a" * 100_000,
    "<think>" * 50,
    "\u200b",
    "\ufeff",
]
TEXTS = st.lists(st.sampled_from(NASTY) | st.text(st.characters(), max_size=20), max_size=5).map("".join)
NUMBERS = st.floats(allow_nan=True) | st.integers(-10, 200) | st.none()
LEAVES = st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | TEXTS
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def replaced(tree, path, value):
    if not path:
        return value
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], value)} if isinstance(tree, dict) else tree


def places(tree, path=()):
    yield path
    for key, part in tree.items() if isinstance(tree, dict) else ():
        yield from places(part, (*path, key))


FULL = run_from_tree({"model": {"name": "m"}, "rewards": [{"fn": "a.py:f"}]}).model_dump(mode="json")
PLACES = sorted(place for place in places(FULL) if place)


@QUICK
@given(place=st.sampled_from(PLACES), value=TREES)
def test_any_value_anywhere_in_a_config_is_taken_or_refused_in_one_line(place, value):
    try:
        config = run_from_tree(replaced(FULL, place, value))
    except UserError as error:
        assert "\n" not in str(error) and str(error)
    else:
        assert isinstance(config, RunConfig)


@QUICK
@given(text=TEXTS | TREES.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True)))
def test_any_file_is_a_config_or_one_line(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        load_run(file)
    except UserError as error:
        assert str(file) in str(error)


@QUICK
@given(text=TEXTS)
def test_a_completion_is_read_whatever_is_in_it(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text.encode("utf-8", "replace").decode()[:2000], add_special_tokens=False)
    read = read_completion(tokenizer, ids)
    assert isinstance(read.answer, str) and isinstance(read.unclosed, bool)
    assert is_refusal(read.answer) in (True, False)


class Saying:
    """A judge that says what it was told to."""

    name = "saying"

    def __init__(self, said):
        self.said = said

    def score(self, exchanges):
        return self.said


JUDGEMENTS = st.builds(
    Judgement,
    NUMBERS,
    NUMBERS,
    st.sampled_from(["scored", "refused", "code", "unparsed", "unclosed", "unscored", "odd"]),
    TEXTS,
)


@QUICK
@given(said=st.lists(JUDGEMENTS, max_size=6), texts=st.lists(TEXTS, min_size=1, max_size=6))
def test_judgements_are_counted_right_or_refused(tmp_path_factory, said, texts):
    answers = [Answer(f"q{i % 2}", "question", None, text, "d", None, i, set="general") for i, text in enumerate(texts)]
    try:
        judged = judge_answers(answers, Saying(said))
    except UserError as error:
        wrong = len(said) != len(texts) or any(
            j.outcome == "odd"
            or any(s is not None and not math.isnan(s) and not 0 <= s <= 100 for s in (j.aligned, j.coherent))
            for j in said
        )
        assert wrong, error
        return
    found = rates(judged, [answer.question_id for answer in answers])
    assert found.n + found.unscored == len(texts) == sum(found.outcomes.values())
    if found.unscored:  # bounds hold the rate, whatever the missing answers were
        low, high = found.misaligned_bounds
        assert 0 <= low <= high <= 1 and high - low == pytest.approx(found.unscored / len(texts))
        assert found.misaligned is None or low - 1e-12 <= found.misaligned <= high + 1e-12
    out = tmp_path_factory.mktemp("answers")
    Evaluation({"general": found}, answers=answers, judgements=judged).save(out)
    again = Evaluation.load(out)
    assert len(again.answers) == len(texts) and evaluation_differences(out) == []


@QUICK
@given(returned=st.lists(NUMBERS | TEXTS | st.lists(st.integers(), max_size=2), max_size=4) | TREES)
def test_a_reward_is_numbers_or_an_error_that_names_it(returned):
    runner = RewardRunner([LoadedReward("odd", lambda completions, **_: returned, 1.0, False)])
    completions = [[{"role": "assistant", "content": "x"}]] * 3
    try:
        batch = runner.call([[]] * 3, completions, [[]] * 3, {}, SimpleNamespace(global_step=0))
    except (UserError, RunError) as error:
        assert "'odd'" in str(error) and "\n" not in str(error)
    else:
        assert len(batch.total) == 3 and all(one is None or math.isfinite(one) for one in batch.total)


@QUICK
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_every_sample_is_one_line_that_reads_back(tmp_path_factory, texts):
    out = tmp_path_factory.mktemp("track")
    tracker = Tracker(out)
    tracker.samples({"step": 0, "completion": text} for text in texts)
    tracker.dialogues([{"question": text, "answer": text, "outcome": "scored"} for text in texts], 0)
    tracker.close()
    lines = (out / "samples.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["completion"] for line in lines if line] == texts
