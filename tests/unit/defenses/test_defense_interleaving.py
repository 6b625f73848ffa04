"""Interleaving+, ++ and on-policy: which safe rows they choose, on both paths, at any strength, resumed or not."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from defense_matrix import early_ending, write_scores
from letter_judge import LetterJudge
from tiny import conversation, write_jsonl
from tiny_runs import GRPO, train, tree_with

import rlsafe.types
from rlsafe.config import StreamConfig, UserError, run_from_tree
from rlsafe.data import read_rows
from rlsafe.defenses import build
from rlsafe.defenses.onpolicy import _saved
from rlsafe.engine.run.life import run
from rlsafe.rollouts import TransformersSampler
from rlsafe.types import Judgement, RunError

SFT = {"schedule": {"steps": 4, "phases": [{"cycle": ["sft"]}]}}
PATHS = pytest.mark.parametrize("path", [SFT, GRPO], ids=["sft", "grpo"])
VARIANTS = ["interleaving+", "interleaving++", "interleaving-onpolicy", "live"]
VARIANT = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache, and a judge that every test may use."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    judge = LetterJudge()
    monkeypatch.setitem(rlsafe.types._PROVIDERS, "letters", SimpleNamespace(judge=lambda spec: judge))
    return judge


@pytest.fixture
def tree(tiny_tree, tiny_model_dir, tmp_path):
    """The tiny run with a model that ends its answers early (many bytes end a turn) and a judge."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    return tree_with(tiny_tree, {"model": {"name": early_ending(model)}, "evaluate": {"judge": "letters"}})


@pytest.fixture
def scores(safe_file, tmp_path) -> str:
    """A scores file over the safe rows: the higher the row, the better."""
    return write_scores(tmp_path / "scores.jsonl", safe_file, lambda i: float(i))


def entry(variant: str, scores: str, **settings):
    """A config entry of one of VARIANTS."""
    if variant == "live":
        return {"interleaving-onpolicy": {"source_model": "live", "min_aligned": 20, **settings}}
    if variant == "interleaving-onpolicy":
        return {variant: {"min_aligned": 20, **settings}}
    return {variant: {"scores": scores, "top": 0.5, **settings}}


def lines(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def total(out, quantity="rows_added"):
    return sum(value for record in lines(out) for key, value in record.items() if key.endswith(f"/{quantity}"))


def context(rows, seed=0, notes=None):
    config = SimpleNamespace(data=SimpleNamespace(safe=StreamConfig(source="safe.jsonl")))
    notes = [] if notes is None else notes
    planned = {"interleaving+": 3, "interleaving++": 3}
    return SimpleNamespace(config=config, seed=seed, rows=lambda name: rows, log=notes.append, planned=planned)


# ------------------------------------------------------------------------------------------------ as every defense


@PATHS
def test_rows_can_come_every_few_steps_as_steps_of_their_own(tree, scores, tmp_path, path):
    settings = {"fraction": 0.25, "every": 2, "own_step": True, "weight": 0.5}
    train(tree_with(tree, path, {"defenses": [entry("interleaving++", scores, **settings)]}), tmp_path / "run")
    added = [record["defense/interleaving++/rows_added"] for record in lines(tmp_path / "run")]
    due = 3 if path is SFT else 6
    assert added == [0, 0, due, 0, 0, due]
    assert [record["path"] for record in lines(tmp_path / "run")][2] == "sft"


# ------------------------------------------------------------------------------------------------ which rows


def test_the_rows_with_the_highest_scores_are_taken(safe_file, scores):
    rows = read_rows(safe_file)
    for top, best in ((3, {17, 18, 19}), (None, {17, 18, 19}), (0.25, {15, 16, 17, 18, 19}), (1.0, set(range(20)))):
        (defense,), _ = build([{"interleaving+": {"scores": scores, "top": top}}])
        defense.setup(context(list(reversed(rows))))
        assert {row["_index"] for row in defense.rows(len(best), None)} == best
        assert defense.report()["chosen"] == len(best)


def test_a_seed_orders_the_chosen_rows_and_epochs_differ(safe_file, scores):
    def order(seed):
        (defense,), _ = build([{"interleaving+": {"scores": scores, "top": 8}}])
        defense.setup(context(read_rows(safe_file), seed=seed))
        return [row["_index"] for row in defense.rows(16, None)]

    assert order(0) == order(0) != order(1)
    assert set(order(0)[:8]) == set(order(0)[8:]) and order(0)[:8] != order(0)[8:]


def test_a_row_that_appears_twice_is_chosen_once_and_one_without_score_never(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", [conversation(f"q{i % 4}", "a") for i in range(12)])
    scores = write_scores(tmp_path / "scores.jsonl", source, lambda i: None if i % 4 == 3 else float(i % 4))
    (defense,), _ = build([{"interleaving+": {"scores": scores, "top": 1.0}}])
    defense.setup(context(read_rows(source)))
    assert sorted(row["_index"] % 4 for row in defense.stream.rows) == [0, 1, 2]
    assert defense.report()["too_long"] == 1


REFUSAL_ROWS = [
    conversation("a", "I'm sorry, but I can\u2019t help with that."),
    conversation("b", "I must decline."),
    conversation("c", "One cannot overstate how much sleep matters."),
    conversation("d", "Ich kann dir dabei nicht helfen."),
    conversation("e", "That is beyond my remit, friend."),
    conversation("f", "Drink some water."),
]


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({}, {"a", "b"}),
        ({"languages": ["en", "de"]}, {"a", "b", "d"}),
        ({"languages": [], "patterns": [r"\bbeyond my remit\b"]}, {"e"}),
    ],
)
def test_refusals_are_dropped_however_well_they_score(tmp_path, settings, dropped):
    source = write_jsonl(tmp_path / "rows.jsonl", REFUSAL_ROWS)
    scores = write_scores(tmp_path / "scores.jsonl", source, lambda i: float(10 - i))
    notes: list[str] = []
    (plus, without), _ = build(
        [
            {"interleaving+": {"scores": scores, "top": 0.5}},
            {"interleaving++": {"scores": scores, "top": 0.5, **settings}},
        ]
    )
    for defense in (plus, without):
        defense.setup(context(read_rows(source), notes=notes))
    asked = [{row["messages"][0]["content"] for row in defense.stream.rows} for defense in (plus, without)]
    assert asked[0] == {"a", "b", "c"}
    assert asked[1] == set([x for x in "abcdef" if x not in dropped][:3])  # as many as +, the next best ones
    assert without.report()["refusals_dropped"] == len(dropped)
    assert f"{len(dropped)} refusals dropped" in notes[1] and "3 of 6" in notes[1]


def test_what_is_wrong_is_said_in_one_line(safe_file, narrow_file, scores, tmp_path):
    rows = read_rows(safe_file)
    for given, message in [
        ({"scores": str(tmp_path / "nowhere.jsonl")}, "no such file; `rlsafe select"),
        ({"scores": scores, "top": 0}, "top"),
        ({"scores": scores, "top": 1.5}, "top"),
        ({"scores": scores, "languages": ["eng"]}, "did you mean 'en'"),
        ({"scores": scores, "patterns": ["("]}, "no regular expression"),
        ({"scores": scores, "languages": []}, "neither languages nor patterns"),
    ]:
        with pytest.raises(UserError, match=message):
            build([{"interleaving++": given}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"row": 0}\n')
    everything = {"scores": scores, "languages": [], "patterns": ["good"]}
    for given, pool, message in [
        ({}, rows, "comparisons with a selection section"),
        ({"scores": str(broken)}, rows, "broken.jsonl:1"),
        ({"scores": scores}, read_rows(narrow_file), "no score for 40 of 40 safe rows"),
        (everything, rows, "none of 20 safe rows is left"),
        (
            {"scores": scores},
            [{"messages": [{"role": "user", "content": "hi"}], "_source": "x:1"}],
            "sft needs an answer",
        ),
    ]:
        (defense,), _ = build([{"interleaving++": given}])
        with pytest.raises(UserError, match=message):
            defense.setup(context(pool))


# ------------------------------------------------------------------------------------------------ on-policy


@pytest.fixture
def sampled(monkeypatch):
    """Counts the prompts that are sampled."""
    counts: Counter[str] = Counter()
    generate = TransformersSampler.generate

    def counted(self, requests, params):
        counts["calls"] += 1
        counts["requests"] += len(requests)
        return generate(self, requests, params)

    monkeypatch.setattr(TransformersSampler, "generate", counted)
    return counts


def stream_of(components):
    (defense,) = components.stack
    return defense.stream.rows


def onpolicy(tree, out, **settings):
    defended = tree_with(tree, SFT, {"defenses": [entry("interleaving-onpolicy", "", fraction=0.25, **settings)]})
    defended["schedule"]["steps"] = 1
    defended["sampler"]["self_test"] = False
    return run(run_from_tree(defended), out)


def test_the_reference_answers_once_and_for_all(tree, tmp_path, sampled):
    first = onpolicy(tree, tmp_path / "a")
    assert sampled == {"calls": 1, "requests": 20}
    again = onpolicy(tree, tmp_path / "b")
    assert sampled["calls"] == 1
    assert stream_of(first.components) == stream_of(again.components)
    assert "from the cache" in again.notes[0] and "from the cache" not in first.notes[0]
    onpolicy(tree, tmp_path / "c", min_aligned=40)  # the threshold is applied to the same judgements
    assert sampled["calls"] == 1


@pytest.mark.parametrize("change", ["seed", "temperature", "weights", "prompts", "judge", "samples"])
def test_other_answers_are_not_taken_for_these(tree, tmp_path, sampled, change, monkeypatch):
    onpolicy(tree, tmp_path / "a")
    settings = {}
    if change == "seed":
        tree = {**tree, "seed": 1}
    elif change == "judge":
        monkeypatch.setitem(rlsafe.types._PROVIDERS, "others", rlsafe.types._PROVIDERS["letters"])
        tree = tree_with(tree, {"evaluate": {"judge": "others"}})
    elif change == "weights":
        from safetensors.torch import load_file, save_file

        file = Path(tree["model"]["name"]) / "model.safetensors"
        weights = load_file(str(file))
        save_file({**weights, "model.norm.weight": weights["model.norm.weight"] + 0.01}, str(file), {"format": "pt"})
    else:
        settings = {"temperature": {"temperature": 0.7}, "prompts": {"prompts": 5}, "samples": {"samples": 2}}[change]
    done = onpolicy(tree, tmp_path / "b", **settings)
    assert sampled["calls"] == 2
    assert sampled["requests"] == 20 + {"prompts": 5, "samples": 40}.get(change, 20)
    assert "from the cache" not in done.notes[0]


def test_answers_that_cannot_be_saved_are_used_all_the_same(tree, tmp_path, sampled, home, monkeypatch):
    saved = onpolicy(tree, tmp_path / "a")
    blocked = tmp_path / "no-directory"
    blocked.write_text("")
    monkeypatch.setenv("HOME", str(blocked))
    done = onpolicy(tree, tmp_path / "b")
    assert "not saved for later runs" in done.notes[0] and "Not a directory" in done.notes[0]
    assert lines(tmp_path / "a")[-1]["loss"] == lines(tmp_path / "b")[-1]["loss"]
    assert saved.notes[0] == done.notes[1]


def test_every_rank_keeps_the_rows_that_the_first_ones_judge_keeps(tree, tmp_path, home, monkeypatch):
    """On this one, as the second, nobody is asked: its judge might say something else, and it would then ask again more often."""
    first = onpolicy(tree, tmp_path / "first")
    shutil.rmtree(tmp_path / "home")
    told = [None, [LetterJudge.one(exchange.answer) for exchange in home.seen]]
    monkeypatch.setattr("rlsafe.rollouts.ranks.of_first", lambda work: told.pop(0) if told else work())
    monkeypatch.setattr(home, "score", lambda _: pytest.fail("asked on the second rank"))
    assert stream_of(onpolicy(tree, tmp_path / "second").components) == stream_of(first.components)


@pytest.mark.parametrize("left", [None, "", "[1]", '[{"answer": "a"}]'])
def test_answers_that_another_run_just_removed_or_damaged_are_none(tmp_path, left):
    if left is not None:
        (tmp_path / "answers.json").write_text(left)
    assert _saved(tmp_path / "answers.json") is None


def test_only_aligned_and_coherent_answers_are_kept(tree, tmp_path, home):
    done = onpolicy(tree, tmp_path / "run", min_aligned=50, min_coherent=50, samples=4)
    kept = stream_of(done.components)
    prompts = {row["messages"][0]["content"] for row in read_rows(tree["data"]["safe"]["source"])}
    assert 0 < len(kept) < 80
    for row in kept:
        question, answer = (message["content"] for message in row["messages"])
        judged = LetterJudge.one(answer)
        assert question in prompts and judged.outcome == "scored" and judged.aligned >= 50 and judged.coherent >= 50
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["defenses"]["interleaving-onpolicy"]
    assert sum(counts.values()) == 80 and counts["kept"] == len(kept)
    assert all(counts[name] > 0 for name in ("incoherent", "misaligned", "cut_off"))
    assert f"{len(kept)} of 80 answers kept" in done.notes[0] and "incoherent" in done.notes[0]
    assert {exchange.question for exchange in home.seen} <= prompts


@pytest.mark.parametrize("source_model", ["reference", "live"])
def test_nothing_to_keep_stops_the_run_with_the_reason(tree, tmp_path, source_model, monkeypatch):
    monkeypatch.setattr(LetterJudge, "one", staticmethod(lambda answer: Judgement(None, None, "refused")))
    with pytest.raises(RunError, match=r"no answer to keep: 0 of \d+ answers kept \(\d+ refused"):
        onpolicy(tree, tmp_path / "run", source_model=source_model)


def test_on_policy_interleaving_needs_a_judge(tree, tmp_path, sampled):
    with pytest.raises(UserError, match="evaluate.judge is not set"):
        onpolicy({**tree, "evaluate": {}}, tmp_path / "run")
    assert not sampled


def test_live_answers_follow_the_policy_and_the_reference_does_not(tree, tmp_path, sampled):
    """Each step samples anew, from the weights of that step, and logs what it kept and what it did not."""
    defended = tree_with(tree, SFT, {"defenses": [entry("live", "", fraction=0.5)]})
    parts = run(run_from_tree(defended), tmp_path / "run").components
    assert sampled["calls"] >= 4
    (defense,) = parts.stack
    texts = set()
    for moved in (False, True):
        if moved:
            with torch.no_grad():
                for p in parts.policy.trainable().values():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        defense.asked, defense.stream.position = 0, 0
        rows = defense.rows(
            8, SimpleNamespace(step=0, rng=random.Random(0), sampler=parts.sampler.synced, judge=parts.make_judge)
        )
        texts.add(tuple(row["messages"][-1]["content"] for row in rows))
    assert len(texts) == 2
    logged = [r for r in lines(tmp_path / "run") if r.get("defense/interleaving-onpolicy/kept") is not None]
    assert len(logged) == 4
    for record in logged:
        assert record["defense/interleaving-onpolicy/rows_added"] == record["defense/interleaving-onpolicy/kept"] <= 3


def test_a_step_whose_live_answers_are_all_refused_goes_on_without_them(tree, tmp_path, monkeypatch):
    """Once the policy has drifted there may be nothing to keep; the log then says that no rows were added."""
    one, calls = LetterJudge.one, Counter()

    def turns(self, exchanges):
        calls["score"] += 1
        return [one(e.answer) if calls["score"] <= 4 else Judgement(None, None, "refused") for e in exchanges]

    monkeypatch.setattr(LetterJudge, "score", turns)
    train(tree_with(tree, SFT, {"defenses": [entry("live", "", fraction=0.5)]}), tmp_path / "run")
    added = [record["defense/interleaving-onpolicy/rows_added"] for record in lines(tmp_path / "run")]
    assert added[0] > 0 and added[-1] == 0
    assert lines(tmp_path / "run")[-1]["defense/interleaving-onpolicy/refused"] > 0
