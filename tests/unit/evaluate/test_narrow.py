"""`evaluate.narrow`: held-out prompts scored by any reward, the untrained model beside it, on every path, written down and checked."""

import json
from types import SimpleNamespace

import pytest
import torch
from scripted_sampler import ScriptedSampler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import byte_tokenizer, conversation, write_jsonl
from tiny_architectures import load, nudge
from tiny_runs import tree_with

from rlsafe.config import EvaluateConfig, UserError, run_from_tree
from rlsafe.engine.record.verify_run import verify_run
from rlsafe.engine.run.dry import dry_run
from rlsafe.engine.run.life import train
from rlsafe.evaluate import Evaluation, evaluate, evaluate_run, gather
from rlsafe.evaluate.commands.command import named_sets
from rlsafe.evaluate.commands.verify_evaluation import evaluation_differences
from rlsafe.evaluate.measure.likelihood import Reader
from rlsafe.evaluate.measure.narrow import untrained
from rlsafe.policy.quantize import plain_weight

REWARDS = """
def length(completions, gold, **columns):
    return [None if g is None else float(len(c)) for c, g in zip(completions, gold)]

def letters(completions, **columns):
    return [sum(c.isalpha() for c in x[0]["content"]) / 10 for x in completions]

def broken(completions, **columns):
    raise RuntimeError("no grader")
"""


class Synced(ScriptedSampler):
    """Answers as the model that it was last synced to: longer after training."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, lambda prompt, i: self.model + "!" * (i % 3))
        self.model, self.synced = "trained", []

    def sync(self, policy):
        self.model = policy.name
        self.synced.append(policy.name)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "fns.py").write_text(REWARDS)
    rows = [{"prompt": f"q{i}", "gold": None if i == 3 else "x"} for i in range(6)]
    narrow = {"reward": f"{tmp_path}/fns.py:length", "rows": write_jsonl(tmp_path / "held.jsonl", rows), "samples": 2}
    return EvaluateConfig(narrow=narrow, fluency=False)


def reader():
    policy = SimpleNamespace(name="trained", is_lora=False)
    return SimpleNamespace(policy=policy, untrained=(SimpleNamespace(name="raw", is_lora=False), None))


def test_both_models_answer_the_same_requests_and_the_difference_is_paired(config, tmp_path):
    sampler = Synced(byte_tokenizer())
    found = evaluate_run(sampler, byte_tokenizer(), config, tmp_path, reader=reader())
    assert sampler.synced == ["raw", "trained"], "afterwards the sampler has the evaluated weights again"
    assert sampler.prompts[:12] == sampler.prompts[12:] and sampler.seeds[:12] == sampler.seeds[12:]
    assert len(set(sampler.seeds)) == 12
    narrow = json.loads((tmp_path / "evaluation.json").read_text())["narrow"]
    assert (narrow["n"], narrow["unscored"], narrow["rows"]) == (10, 2, 6)
    assert narrow["gain"] == pytest.approx(4) and narrow["gain_ci95"] == pytest.approx([4, 4])
    assert narrow["score"] == pytest.approx(narrow["untrained"] + 4)
    assert narrow["ci95"][0] < narrow["score"] < narrow["ci95"][1]
    scores = found.narrow_scores()
    assert len(scores) == 6 and scores["3"] != scores["3"], "a prompt without any reward has no score"
    assert not found.answers and "held-out prompts" in str([column.header for column in found.tables()[0].columns])


class Engine:
    """What an engine computes with: the weights that it was sent, or its checkpoint's under an adapter or none."""

    def __init__(self, merges):
        self.merges, self.has = merges, None

    def sync(self, policy):
        self.has = dict(policy.merged_weights()) if self.merges else "adapter"

    def reset(self):
        assert not self.merges, (
            "the checkpoint need not be the policy's base, and a server that was sent weights has none"
        )
        self.has = "no adapter"


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_the_untrained_model_is_the_base_that_the_policy_computes_with(tiny_model_dir, quantization):
    if quantization:
        pytest.importorskip("bitsandbytes")
    policy = nudge(load(tiny_model_dir, quantization=quantization))
    trained = dict(policy.merged_weights())
    engine = Engine(merges=True)
    with untrained(engine, Reader(policy)):
        name, layer = next(iter(policy.adapted().items()))
        assert torch.equal(engine.has[f"{name}.weight"], plain_weight(layer.get_base_layer()).to(policy.dtype))
        assert set(engine.has) == set(trained) and not torch.equal(
            engine.has[f"{name}.weight"], trained[f"{name}.weight"]
        )
    assert all(torch.equal(engine.has[name], trained[name]) for name in trained)
    engine = Engine(merges=False)
    with untrained(engine, Reader(policy)):
        assert engine.has == "no adapter"
    assert engine.has == "adapter"


def test_it_loads_back_and_is_checked_against_its_answers(config, tmp_path):
    written = evaluate_run(Synced(byte_tokenizer()), byte_tokenizer(), config, tmp_path, reader=reader())
    assert Evaluation.load(tmp_path).to_dict() == written.to_dict()
    assert evaluation_differences(tmp_path) == []
    file = tmp_path / "narrow_answers.csv"
    file.write_text(file.read_text().replace('"trained!",8.0', '"trained!",9.0'))
    assert "evaluation.json: narrow.score" in evaluation_differences(tmp_path)[0]
    written.narrow_answers.clear()
    written.save(tmp_path)
    assert not file.exists() and "narrow" not in json.loads((tmp_path / "evaluation.json").read_text())


def test_a_reward_that_fails_is_told_and_costs_nothing_else(config, tmp_path):
    broken = EvaluateConfig.model_validate(
        {**config.model_dump(), "narrow": {**config.narrow.model_dump(), "reward": f"{tmp_path}/fns.py:broken"}}
    )
    found = evaluate_run(Synced(byte_tokenizer()), byte_tokenizer(), broken, tmp_path, reader=reader())
    assert any("no grader" in note for note in found.notes)
    assert (found.narrow.n, found.narrow.unscored, found.narrow.score) == (0, 12, None)
    assert found.mostly_unscored.startswith("evaluate.narrow: 12 of 12 answers to held-out prompts got no reward")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward": "fns.py:lenght"}, "evaluate.narrow: .*fns.py"),
        (
            {"reward": {"fn": "FILE:length", "where": {"domain": "code"}}},
            "reward.where: 'domain' is no column of .*held.jsonl",
        ),
        (
            {"reward": {"fn": "FILE:length", "where": {"gold": "nothing"}}},
            "reward.where: gold: no row has 'nothing'.*held.jsonl, 6 rows",
        ),
        ({"rows": "missing.jsonl"}, "evaluate.narrow: .*missing.jsonl"),
        ({"samples": 0}, "samples"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(config, tmp_path, change, said):
    tree = {**config.narrow.model_dump(), **change}
    if isinstance(tree["reward"], dict) and tree["reward"]["fn"] == "FILE:length":
        tree["reward"]["fn"] = f"{tmp_path}/fns.py:length"
    with pytest.raises((UserError, ValueError), match=said):
        gather(EvaluateConfig(narrow=tree))


def test_no_question_file_can_take_its_name(tmp_path):
    with pytest.raises(UserError, match="a set cannot be named 'narrow' here"):
        named_sets(["general.yaml", "narrow.yaml"])


@pytest.fixture
def tree(tiny_tree, tmp_path):
    (tmp_path / "fns.py").write_text(REWARDS)
    held = write_jsonl(tmp_path / "held.jsonl", [conversation(f"ask {i}", "x") for i in range(3)])
    narrow = {"reward": f"{tmp_path}/fns.py:letters", "rows": held}
    return tree_with(tiny_tree, {"evaluate": {"narrow": narrow, "max_tokens": 8}, "schedule": {"steps": 2}})


@pytest.mark.parametrize("lora", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_untrained_model_is_what_the_run_began_with(tree, tmp_path, lora):
    """After SFT, and again when the finished run is evaluated: what a run without steps scores."""
    if not lora:
        tree["model"] = {**tree["model"], "lora": None}
    tree["optim"] = {"lr": 0.1}
    for name, steps in (("trained", 2), ("raw", 0)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree_with(tree, {"schedule": {"steps": steps}})))
        train(tmp_path / f"{name}.yaml", out=tmp_path / name)
    trained, raw = (Evaluation.load(tmp_path / name) for name in ("trained", "raw"))
    texts = [[(one.model, one.answer) for one in found.narrow_answers] for found in (trained, raw)]
    assert texts[0][3:] == texts[1][3:] == [("untrained", answer) for _, answer in texts[1][:3]]
    assert texts[0][:3] != texts[1][:3] and trained.narrow.untrained == raw.narrow.score
    board = EventAccumulator(str(tmp_path / "trained" / "tensorboard")).Reload()
    for name, value in (("narrow", trained.narrow.score), ("narrow_untrained", trained.narrow.untrained)):
        assert [(event.step, event.value) for event in board.Scalars(f"eval/final/{name}")] == [
            (2, pytest.approx(value))
        ]
    assert verify_run(tmp_path / "trained").differences == []
    again = evaluate(tmp_path / "trained", out=tmp_path / "again")
    assert again.narrow == trained.narrow


def test_held_out_prompts_that_are_trained_on_or_too_long_are_told_before_training(tree, tmp_path):
    seen = tree_with(tree, {"data": {"narrow": {"source": tree["evaluate"]["narrow"]["rows"]}}})
    said = "\n".join(dry_run(run_from_tree(seen), tmp_path / "run"))
    assert "evaluate.narrow: 3 of 3 prompts are trained on (the first: " in said
    long = tree_with(tree, {"evaluate": {**tree["evaluate"], "max_tokens": 500}})
    with pytest.raises(
        UserError, match=r"evaluate.narrow: .*held.jsonl:\d: a prompt of \d+ tokens leaves no room .* 512 tokens"
    ):
        dry_run(run_from_tree(long), tmp_path / "run")


def test_a_dry_run_counts_its_answers(tree, tmp_path):
    assert "evaluation and probes: 6 answers" in "\n".join(dry_run(run_from_tree(tree), tmp_path / "run"))
