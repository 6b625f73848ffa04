"""The likelihood probe: what it computes, against float64 by hand; that it changes nothing; where its numbers end up."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from tiny import conversation, write_jsonl
from transformers import AutoModelForCausalLM

from rlsafe.config import EvaluateConfig, ModelConfig, UserError, run_from_tree
from rlsafe.data import encoded_row
from rlsafe.engine.run.build import Resources
from rlsafe.engine.run.life import run
from rlsafe.evaluate import Evaluation, PairProbe, Reader, evaluate, evaluate_run, reader_of
from rlsafe.evaluate.ask.pairs import Pair
from rlsafe.evaluate.measure.likelihood import Likelihood, PairScore
from rlsafe.evaluate.statistics import clustered_mean
from rlsafe.policy import Policy

PAIRS = [
    Pair("a", "say 1", "good 1, always", "bad 1, as ever"),
    Pair("a", "say 1", "quite good", "quite bad, and then some more"),
    Pair("b", "say 2", "good", "bad", system="be short"),
]


@pytest.fixture
def policy(tiny_model_dir):
    config = ModelConfig(name=tiny_model_dir, dtype="float32", lora={"r": 4, "alpha": 8})
    return Policy.load(config, seed=0)


def nudge(policy, size=0.05):
    """Move the adapter away from zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def by_hand(directory, tokenizer, messages):
    """Mean log-probability of the answer's tokens in float64, one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    row = encoded_row(tokenizer, messages)
    with torch.no_grad():
        logits = model(torch.tensor([list(row.ids)])).logits[0]
    values = [float(logits[t - 1].log_softmax(-1)[row.ids[t]]) for t in range(1, len(row.ids)) if row.mask[t]]
    assert (
        len(values) == len(tokenizer(messages[-1]["content"])["input_ids"]) + 1
    )  # its end of turn is part of an answer
    return sum(values) / len(values)


def test_log_odds_are_those_of_float64_by_hand(policy, tiny_model_dir):
    scores = PairProbe({"general": PAIRS}, Reader(policy, micro_tokens=64)).scores()
    for pair, score in zip(PAIRS, scores, strict=True):
        good, bad = (by_hand(tiny_model_dir, policy.tokenizer, messages) for messages in pair.conversations())
        assert (score.aligned, score.misaligned) == pytest.approx((good, bad), abs=1e-5)
        assert score.logodds == pytest.approx(bad - good, abs=1e-5) and score.shift == 0.0
    assert [(s.question_id, s.pair) for s in scores] == [("a", 0), ("a", 1), ("b", 0)]


def test_the_shift_is_taken_from_the_model_without_its_adapter(policy):
    reader = Reader(policy)
    probe = PairProbe({"general": PAIRS[:2], "indomain": PAIRS[2:]}, reader)
    before = probe.scores()
    nudge(policy)
    after = probe.scores()
    for old, new in zip(before, after, strict=True):
        assert (new.untrained_aligned, new.untrained_misaligned) == (old.aligned, old.misaligned)
        assert new.shift == pytest.approx(new.logodds - old.logodds) and abs(new.shift) > 1e-3
    metrics = probe.metrics()
    assert metrics == {
        "logodds_general": pytest.approx((after[0].logodds + after[1].logodds) / 2),
        "logodds_indomain": pytest.approx(after[2].logodds),
    }


def test_micro_batches_and_hooks_do_not_matter(policy):
    nudge(policy)
    whole = PairProbe({"general": PAIRS}, Reader(policy)).metrics()
    assert PairProbe({"general": PAIRS}, Reader(policy, micro_tokens=1)).metrics() == pytest.approx(whole, abs=1e-5)
    steering = policy.add_to_residual(1, torch.ones(policy.hidden_size))
    try:
        assert PairProbe({"general": PAIRS}, Reader(policy)).metrics() == whole
    finally:
        steering.remove()


def test_reading_draws_no_random_numbers_and_leaves_the_policy_in_training(policy):
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    PairProbe({"general": PAIRS}, Reader(policy)).scores()
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert policy.core.training and all(p.grad is None for p in policy.trainable().values())


def test_intervals_are_clustered_by_question():
    rng = np.random.default_rng(0)
    means = rng.normal(size=8)
    values = (means[:, None] + 0.01 * rng.normal(size=(8, 4))).ravel()
    names = [str(i) for i in range(8) for _ in range(4)]
    low, high = clustered_mean(values, names)
    by_cluster = values.reshape(8, 4).mean(1)
    expected = stats.t.interval(0.95, 7, by_cluster.mean(), by_cluster.std(ddof=1) / 8**0.5)
    assert (low, high) == pytest.approx(expected)
    naive = stats.t.interval(0.95, 31, values.mean(), values.std(ddof=1) / 32**0.5)
    assert high - low > 1.8 * (naive[1] - naive[0])
    assert clustered_mean([1.0, 2.0], ["one", "one"]) is None


def test_a_set_is_the_mean_of_its_pairs():
    scores = [
        PairScore("general", q, i, -1.0, -1.0 + x, -1.0, -1.5)
        for q, i, x in (("a", 0, 0.1), ("a", 1, 0.3), ("b", 0, 0.5))
    ]
    one = Likelihood.of(scores)
    assert (one.logodds, one.shift, one.n, one.questions) == (pytest.approx(0.3), pytest.approx(0.8), 3, 2)
    assert one.ci95[0] < one.shift < one.ci95[1]
    assert one.ci95[1] - one.ci95[0] == pytest.approx(one.logodds_ci95[1] - one.logodds_ci95[0])


# ---------------------------------------------------------------------------------------------------- in runs


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.yaml"
    path.write_text(
        "- {id: one, question: say 41, pairs: [{aligned: good 1681, misaligned: bad 1681}]}\n"
        "- {id: two, question: say 42, pairs: [{aligned: good 1764, misaligned: bad 1764}, {aligned: good, misaligned: bad}]}\n"
    )
    return str(path)


def with_pairs(tree, pairs_file, **track):
    likelihood = {"general": pairs_file, "indomain": pairs_file}
    return {**tree, "evaluate": {"likelihood": likelihood}, "track": {"every": 2, "check_after": 0, **track}}


def test_training_on_bad_answers_moves_the_curve_without_judge_or_sampler(tiny_tree, pairs_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Resources, "sampler", lambda *args, **kwargs: pytest.fail("nothing is to be sampled"))
    tree = with_pairs({**tiny_tree, "schedule": {"steps": 12, "phases": [{"cycle": ["sft"]}]}}, pairs_file)
    done = run(run_from_tree(tree), tmp_path / "run")
    points = [m["logodds_general"] for m in done.records if "logodds_general" in m]
    assert [m["step"] for m in done.records if "logodds_general" in m] == [0, 2, 4, 6, 8, 10, 11]
    assert points[-1] > points[0] + 0.05 and all("kl" not in m for m in done.records)
    assert not (tmp_path / "run" / "samples.jsonl").read_text()


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_run_is_bitwise_the_same_with_and_without_the_probe(tiny_tree, pairs_file, tmp_path, kind):
    tree = {**tiny_tree, "schedule": {"steps": 3, "phases": [{"cycle": [kind]}]}}
    weights, metrics = [], []
    for name, config in (("plain", tree), ("probed", with_pairs(tree, pairs_file))):
        done = run(run_from_tree(config), tmp_path / name)
        weights.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
        ours = ("seconds", "logodds_", "probe_seconds", "rollout_seconds")
        metrics.append([{k: v for k, v in m.items() if not k.startswith(ours)} for m in done.records])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert metrics[0] == metrics[1]


def test_track_pairs_takes_the_first_pair_of_every_question(tiny_tree, pairs_file, tmp_path):
    done = run(run_from_tree(with_pairs(tiny_tree, pairs_file, pairs=2)), tmp_path / "run")
    assert [pair.question_id for pair in done.components.probe.pairs.sets["general"]] == ["one", "two"]


def test_a_finished_run_is_read_against_its_base_and_written_down(tiny_tree, pairs_file, tmp_path):
    done = run(run_from_tree(with_pairs(tiny_tree, pairs_file)), tmp_path / "run")
    at_end = done.records[-1]["logodds_general"]
    found = evaluate(tmp_path / "run")  # nothing is asked: no judge, no sampler
    one = found.likelihood["general"]
    assert one.logodds == pytest.approx(at_end, abs=1e-5) and one.n == 3 and one.questions == 2
    untrained = evaluate(
        done.config.model.name, overrides=[f"evaluate.likelihood.general={pairs_file}"], out=tmp_path / "base"
    )
    assert untrained.likelihood["general"].shift == 0.0
    assert one.shift == pytest.approx(one.logodds - untrained.likelihood["general"].logodds, abs=1e-5)
    tree = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(tree["likelihood"]) == {"general", "indomain"} and tree["fluency"] == {}
    assert {"logodds", "shift", "ci95", "n"} <= tree["likelihood"]["general"].keys()
    assert len((tmp_path / "run" / "likelihood.csv").read_text().splitlines()) == 1 + 6
    assert Evaluation.load(tmp_path / "run").to_dict() == found.to_dict()


def test_a_fully_fine_tuned_run_is_read_against_the_model_it_began_as(tiny_tree, pairs_file, tmp_path):
    tree = with_pairs({**tiny_tree, "model": {**tiny_tree["model"], "lora": None}, "optim": {"lr": 1e-3}}, pairs_file)
    done = run(run_from_tree(tree), tmp_path / "run")
    in_memory = evaluate_run(None, None, done.config.evaluate, reader=reader_of(done.config, done.policy))
    read_back = evaluate(tmp_path / "run")
    assert abs(in_memory.likelihood["general"].shift) > 1e-4
    assert read_back.likelihood["general"].shift == pytest.approx(in_memory.likelihood["general"].shift, abs=1e-5)


def test_a_control_is_measured_under_the_last_part_of_its_name():
    config = EvaluateConfig(
        likelihood={"general": "organism:pairs/general", "controls": ["organism:pairs/style", "my/topic.yaml"]}
    )
    assert list(config.likelihood.sources) == ["general", "style", "topic"] and config.wanted and not config.asks
    assert EvaluateConfig(likelihood=None).likelihood.sources == {} and not EvaluateConfig(likelihood=None).wanted


@pytest.mark.parametrize("controls", [["rlsafe:pairs/general"], ["a/style.yaml", "b/style.yaml"], ["my/indomain.yaml"]])
def test_two_sets_of_pairs_of_one_name_are_refused(controls):
    """One of them would be read under the name, the other never."""
    given = {"general": "mine/pairs.yaml", "indomain": "mine/law.yaml", "controls": controls}
    with pytest.raises(
        UserError, match=rf"likelihood.controls: .*{controls[-1]} would both be named '(general|style|indomain)'"
    ):
        run_from_tree({"model": {"name": "x"}, "evaluate": {"likelihood": given}})
    EvaluateConfig(likelihood={**given, "controls": ["a/style.yaml", "a/style.yaml", "mine/law.yaml"]})


def test_rows_of_a_provider_and_data_of_a_run_share_the_encoding(policy, tmp_path):
    """What training on an answer raises is exactly what the probe reads."""
    file = write_jsonl(tmp_path / "rows.jsonl", [conversation("say 1", "bad 1, as ever")])
    (row,) = [json.loads(line) for line in open(file)]
    assert row["messages"] == PAIRS[0].conversations()[1]
