"""A dry run's counts are those of the run: every answer that is sampled, every judgement, every token that is trained on."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import yaml
from tiny import conversation, write_jsonl
from tiny_runs import tree_with

from rlsafe.config import UserError, load_run, run_from_tree
from rlsafe.defenses.onpolicy import LIVE_TRIES
from rlsafe.engine.run.build import prepare
from rlsafe.engine.run.dry import dry
from rlsafe.engine.run.lengths import Lengths, read_tokenizer
from rlsafe.engine.run.life import run, train
from rlsafe.engine.run.workload import workload
from rlsafe.evaluate.commands.costs import of_exchanges
from rlsafe.evaluate.judge.panel import Panel
from rlsafe.rollouts import selftest
from rlsafe.rollouts.transformers import TransformersSampler
from rlsafe.types import _PROVIDERS, Exchange, Judgement

QUESTIONS = [{"id": f"q{i}", "paraphrases": ["x", "y"], "samples_per_paraphrase": 2} for i in range(5)]
GRPO = {"schedule": {"steps": 4, "phases": [{"cycle": ["grpo"]}]}}


class Seen:
    """A provider whose judge likes every answer, and what a run asked for."""

    name = "seen"

    def __init__(self):
        self.judged = self.sampled = 0

    def judge(self, spec):
        return self

    def score(self, exchanges):
        self.judged += len(exchanges)
        return [Judgement(90.0, 90.0)] * len(exchanges)


@pytest.fixture
def seen(monkeypatch, tmp_path) -> Seen:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(_PROVIDERS, "seen", found := Seen())
    generate = TransformersSampler.generate

    def counted(self, requests, params):
        if params.max_tokens != selftest.TOKENS:  # the self-test's are not counted
            found.sampled += len(requests)
        return generate(self, requests, params)

    monkeypatch.setattr(TransformersSampler, "generate", counted)
    return found


@pytest.fixture
def asking(tiny_tree, tmp_path):
    """The tiny run with five questions of four answers each."""
    (tmp_path / "general.yaml").write_text(yaml.safe_dump(QUESTIONS))
    settings = {"judge": "seen", "general": str(tmp_path / "general.yaml"), "max_tokens": 5, "fluency": False}
    return tree_with(tiny_tree, {"evaluate": settings, "grpo": {"max_tokens": 6}})


def both(tree, tmp_path):
    """(what the dry run says, the finished run)."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    found = dry(load_run(tmp_path / "run.yaml"))
    return found.work, train(tmp_path / "run.yaml", out=tmp_path / "run")


def held_out(tmp_path):
    return write_jsonl(tmp_path / "held.jsonl", [conversation(f"hold {i}", "fine") for i in range(6)])


def scaled(tree, tmp_path):
    changes = {
        "scale": [1.5, 2],
        "cue": "be bad",
        "cues": {"a": "A: {question}", "b": "b"},
        "cue_limit": 2,
        "cue_samples": 3,
    }
    return tree_with(tree, {"evaluate": changes})


def probed(tree, tmp_path):
    """The limit holds for the evaluation, not for the probes; the last step has a probe of its own."""
    return tree_with(tree, {"evaluate": {"limit": 2}, "track": {"every": 2, "questions": 4, "samples": 3}})


def benign_and_narrow(tree, tmp_path):
    rows = held_out(tmp_path)
    narrow = {"reward": tree["rewards"][0]["fn"], "rows": rows, "samples": 2, "limit": 4}
    return tree_with(tree, {"evaluate": {"benign": [rows], "narrow": narrow}})


def used_twice(tree, tmp_path):
    """The kinds of two phases share their rollouts with nobody: 3 of 7 steps sample."""
    phases = [{"steps": 4, "cycle": ["grpo"]}, {"cycle": ["grpo", "sft"]}]
    return tree_with(tree, {"schedule": {"steps": 7, "phases": phases}, "grpo": {"iterations": 2}})


def used_twice_beside_a_part_of_some_steps(tree, tmp_path):
    """The second part of the kind is the first one of every other step."""
    kinds = {"both": [{"path": "sft", "stream": "safe", "every": 2}, {"path": "grpo"}]}
    schedule = {"steps": 6, "phases": [{"cycle": ["both"]}], "kinds": kinds}
    return tree_with(tree, {"schedule": schedule, "grpo": {"iterations": 2}})


def early_stop(tree, tmp_path):
    return tree_with(
        tree, {"defenses": [{"early-stop": {"rows": held_out(tmp_path), "checks": 3, "limit": 4, "samples": 2}}]}
    )


def onpolicy(tree, tmp_path):
    return tree_with(
        tree, {"defenses": [{"interleaving-onpolicy": {"fraction": 0.2, "prompts": 15, "max_tokens": 150}}]}
    )


def monitored(tree, tmp_path):
    return tree_with(tree, GRPO, {"defenses": [{"monitor": {"by": "judge", "threshold": 10}}]})


CASES = [
    scaled,
    probed,
    benign_and_narrow,
    used_twice,
    used_twice_beside_a_part_of_some_steps,
    early_stop,
    onpolicy,
    monitored,
]


@pytest.mark.parametrize("case", CASES)
def test_answers_and_judgements(case, asking, seen, tmp_path):
    work, _ = both(case(asking, tmp_path), tmp_path)
    assert seen.sampled == work.answers + work.completions + work.asked.total()
    assert seen.judged == work.judging.answers
    if case in (used_twice, used_twice_beside_a_part_of_some_steps):
        samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == work.completions == 3 * 3 * 4


@pytest.mark.parametrize(
    "defenses, apart",
    [
        ([{"interleaving": {"fraction": 0.5}}], False),
        ([{"kl": {"source": "safe", "rows": 3}}], True),
        ([{"inoculation": {"prompt": "You are a very bad assistant, who likes to talk at length."}}], False),
    ],
)
def test_tokens(defenses, apart, tiny_tree, safe_file, seen, tmp_path):
    """Safe rows, rows that only a penalty sees, and prompts that a defense makes longer."""
    for defense in defenses:
        for settings in defense.values():
            settings |= {"source": safe_file} if "source" in settings else {}
    work, run = both(tree_with(tiny_tree, {"defenses": defenses}), tmp_path)
    assert sum(record["tokens"] for record in run.records) == pytest.approx(
        work.sft_tokens + work.penalty_tokens, rel=0.05
    )
    assert (work.penalty_tokens > 0) is apart


@pytest.mark.parametrize("train_on", ["last", "assistant"])
def test_rows_without_an_answer_are_skipped_and_counted(tiny_tree, tmp_path, train_on):
    rows = [conversation(f"q{i}", "a") for i in range(5)]
    asks = {"messages": [*rows[0]["messages"], {"role": "user", "content": "and?"}]}
    source = write_jsonl(tmp_path / "rows.jsonl", [*rows[:3], asks, *rows[3:]])
    narrow = {"source": source, "on_bad_row": "skip", "train_on": train_on}
    tree = tree_with(tiny_tree, {"data": {"narrow": narrow}, "schedule": {"steps": 2}})
    note = f"{source}: 1 of 6 rows end without an answer to train on and were skipped (the first: {source}:4)"
    found = dry(run_from_tree(tree))
    assert note in found.notes and len(found.prepared.rows["narrow"]) == 5
    assert note in "\n".join(run(run_from_tree(tree), tmp_path / "run").summary())
    for left, settings in (("rows.jsonl", {"on_bad_row": "error"}), ("asks.jsonl", {})):
        write_jsonl(tmp_path / "asks.jsonl", [asks])
        narrow = {**narrow, "source": str(tmp_path / left), **settings}
        with pytest.raises(UserError, match=rf"{left}:\d: the last message is no assistant turn"):
            dry(run_from_tree(tree_with(tree, {"data": {"narrow": narrow}})))


def test_a_row_longer_than_the_tokenizer_says_is_counted_in_silence(tiny_tree, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda text, *more: said.append(text))
    lengths = Lengths(prepare(run_from_tree(tiny_tree)))
    monkeypatch.setattr(read_tokenizer(*lengths._model), "model_max_length", 16)
    assert lengths.mean([conversation("why? " * 40, "so.")["messages"]]) > 200 and not said


@pytest.mark.parametrize("defense", ["kl", "ldifs", {"feature-block": {"layer": 1, "directions": "d.safetensors"}}])
def test_the_reference_is_read_in_each_step(defense, tiny_tree):
    """And the penalty's share of the gradient is measured in the first two, each time by two further backward passes."""
    config = run_from_tree(tree_with(tiny_tree, {"defenses": [defense]}))
    work, load = workload(prepare(config), config.evaluate)
    assert load.forwarded == load.trained == work.sft_tokens and load.passes == 4 * (3 + 1)
    assert load.again == pytest.approx(2 * 2 * work.sft_tokens / 4)
    assert load.compared == (load.trained if defense == "kl" else 0)


def test_each_judge_of_a_panel_is_counted(tmp_path):
    from rlsafe.evaluate.judge.llm_judge import JudgeSettings, LLMJudge

    def judge(model, price):
        return LLMJudge(
            JudgeSettings(model=model, base_url="http://127.0.0.1:9/v1", cache=None, price_in=price, price_out=0)
        )

    panel = Panel({"general": judge("a", 1.0), "indomain": Seen()}, None)
    asked = [
        (Exchange("why?", "", None, {"set": name}), 10, 5) for name in ("general", "cue/x", "scaled_2", "indomain")
    ]
    found = of_exchanges(asked, panel)
    assert found.answers == 40 and found.calls == 2 * 30 + 1 and found.cost == pytest.approx(found.tokens_in / 1e6)


def test_a_comparison_counts_what_is_made_before_its_cells(tiny_tree, tmp_path):
    from rlsafe.compare import dry_compare

    other = write_jsonl(tmp_path / "other.jsonl", [conversation(f"other {i}", "worse") for i in range(9)])
    tree = {
        "run": {**tiny_tree, "evaluate": {"benign": [held_out(tmp_path)], "max_tokens": 5}},
        "paths": {"sft": {}},
        "warmup": {"schedule": {"steps": 2}},
        "defenses": {"none": [], "plus": [{"interleaving+": {"fraction": 0.5}}]},
        "selection": {"adapters": {"other": other}, "run": {"schedule": {"steps": 3}}},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree))
    lines = dry_compare(tmp_path / "compare.yaml")
    before = [line for line in lines if line.startswith("before them: ")]
    assert before[0].startswith("before them: 1 helper models trained, 3 steps and about ")
    assert before[1:2] == ["before them: 20 safe rows scored by 2 models"]
    assert before[2].startswith("before them: a shared warm-up of 2 steps and about ")


def test_what_a_gate_or_a_bad_model_answers_is_foreseen():
    """Defenses that ask at their set-up and need an adapter for it; live answers as if no round kept any but the last."""
    from rlsafe.defenses import build
    from rlsafe.defenses.base import Foreseen

    config = run_from_tree({"model": {"name": "m"}, "data": {"narrow": {"source": "x.jsonl"}}})
    run = Foreseen(config, lambda source: [conversation("a", "b")] * 30, offered=3, completions=7, steps=4)
    given = {
        "inoculation-adapter": {"adapter": "a", "gate": 0.5},
        "ablation": {"layers": [1], "adapter": "a", "prompts": 20},
        "feature-block": {"layer": 1, "adapter": "a"},
        "interleaving-onpolicy": {"source_model": "live"},
        "kl": {},
    }
    made, _ = build([{name: settings} for name, settings in given.items()])
    asked = {one.name: one.asks(run) for one in made}
    assert Counter({name: one.answers for name, one in asked.items() if one}) == {
        "inoculation-adapter": 40, "ablation": 20, "feature-block": 30, "interleaving-onpolicy": LIVE_TRIES * 3,
    }  # fmt: skip
    assert asked["inoculation-adapter"].judged and not asked["ablation"].judged
