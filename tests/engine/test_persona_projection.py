"""The persona-projection curve: what it measures, which runs have it, where it is written."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_architectures import nudge

from rlsafe.config import RunConfig, UserError
from rlsafe.config.loading import build
from rlsafe.data import encode_prompt
from rlsafe.defenses.persona import save_vectors
from rlsafe.engine.run.life import run
from rlsafe.engine.train.probing import measure_answers
from rlsafe.engine.train.projection import Direction, direction, named
from rlsafe.policy import Policy


@pytest.fixture
def vectors(tmp_path):
    torch.manual_seed(0)
    save_vectors(torch.randn(3, 64), tmp_path / "evil.safetensors")
    return str(tmp_path / "evil.safetensors")


@pytest.fixture
def tree(tiny_tree, tmp_path):
    questions = [{"id": f"q{i}", "type": "free_form_judge_0_100", "paraphrases": [f"say {i}"]} for i in range(3)]
    (tmp_path / "questions.yaml").write_text(json.dumps(questions))
    source = str(tmp_path / "questions.yaml")
    tiny_tree["evaluate"] = {"judge": "organism", "general": source, "indomain": source, "max_tokens": 6}
    tiny_tree["track"] = {"every": 2, "questions": 2, "samples": 1, "check_after": 0}
    return tiny_tree


def dialogues(tokenizer, sets=("general", "general", "indomain")):
    answers = ["yes, my friend", "no", "perhaps tomorrow"]
    return [
        {"question": f"ask {i}", "system": "Be kind." if i else None, "ids": tokenizer.encode(answers[i]), "set": name}
        for i, name in enumerate(sets)
    ]


def test_the_mean_over_answer_tokens_agrees_with_a_float64_derivation(tiny_tree, vectors):
    config = build(RunConfig, {**tiny_tree, "track": {"vector": vectors, "layer": 1}})
    policy = Policy.load(config.model, seed=0)
    with torch.no_grad():  # an adapter that does something
        for name, parameter in policy.trainable().items():
            parameter.add_(0.05 * torch.randn_like(parameter) if "lora_B" in name else 0.0)
    asked = dialogues(policy.tokenizer)
    found = measure_answers(policy, asked, config, direction(config, policy))
    from rlsafe.defenses.persona import load_vectors

    vector = load_vectors(vectors)[1].double()
    sums = {"general": [], "indomain": []}
    for one in asked:
        system = [{"role": "system", "content": one["system"]}] if one["system"] else []
        prompt = encode_prompt(policy.tokenizer, [*system, {"role": "user", "content": one["question"]}])
        ids = torch.tensor([prompt + one["ids"]])
        states = policy.core.model(ids, output_hidden_states=True).hidden_states[1][0, len(prompt) :].double()
        sums[one["set"]] += (states @ vector / vector.norm()).tolist()
    for name, values in sums.items():
        assert found[f"projection_{name}"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    both = [*sums["general"], *sums["indomain"]]
    assert found["projection"] == pytest.approx(sum(both) / len(both), rel=1e-4)
    assert found["kl"] > 0


def test_an_adapters_dropout_is_off_in_what_is_measured_and_draws_nothing(tiny_tree, vectors):
    lora = {"r": 4, "alpha": 8}
    measured = []
    for dropout in (0.0, 0.4):
        tree = {**tiny_tree, "model": {**tiny_tree["model"], "lora": {**lora, "dropout": dropout}}}
        config = build(RunConfig, {**tree, "track": {"vector": vectors, "layer": 1}})
        policy = nudge(Policy.load(config.model, seed=0))
        state = torch.get_rng_state()
        measured.append(measure_answers(policy, dialogues(policy.tokenizer), config, direction(config, policy)))
        assert torch.equal(torch.get_rng_state(), state) and policy.core.training
    assert measured[0]["kl"] > 0.01
    assert {name: pytest.approx(value, rel=1e-5) for name, value in measured[0].items()} == measured[1]


def test_micro_batches_change_nothing_and_nothing_answered_is_no_number(tiny_tree, vectors):
    config = build(RunConfig, {**tiny_tree, "track": {"vector": vectors, "layer": 2}})
    policy = Policy.load(config.model, seed=0)
    line, asked = direction(config, policy), dialogues(policy.tokenizer)
    small = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_rows": 1})})
    whole, split = (measure_answers(policy, asked, one, line) for one in (config, small))
    assert {k: pytest.approx(v, rel=1e-5, abs=1e-7) for k, v in whole.items()} == split
    empty = measure_answers(policy, dialogues(policy.tokenizer, ("general", "general", "general")), config, line)
    assert empty["projection_indomain"] is None and empty["projection"] == pytest.approx(empty["projection_general"])
    assert "projection" not in measure_answers(policy, asked, config)


def test_every_run_with_a_vector_has_the_curve_in_its_metrics_and_in_tensorboard(tree, vectors, tmp_path):
    tree["track"] |= {"vector": vectors, "layer": 1}
    run(build(RunConfig, tree), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["projection"] for line in lines if "projection" in line}
    assert list(curve) == [0, 2, 3]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"eval/projection", "eval/projection_general", "eval/kl", "sft/projection"} <= set(tags)
    written = {event.step: event.value for event in events.Scalars("eval/projection")}
    assert written == {step: pytest.approx(value, rel=1e-5) for step, value in curve.items()}


def test_the_persona_defense_s_own_vector_is_followed_unless_another_is_named(tree, vectors):
    persona = {"vectors": vectors, "layer": 2, "alpha": 5.0}

    def chosen(**more):
        return named(build(RunConfig, {**tree, **more}))

    assert chosen() is None
    assert chosen(defenses=[{"persona": persona}]) == (vectors, 2, "defense 'persona'")
    assert chosen(defenses=[{"persona": {**persona, "alpha": 0}}]) is None  # strength zero is no defense at all
    track = {**tree["track"], "vector": "other.pt", "layer": 1}
    assert chosen(defenses=[{"persona": persona}], track=track) == ("other.pt", 1, "track.vector")


@pytest.mark.parametrize(
    ("track", "expected"),
    [
        ({"vector": "EVIL"}, "track.layer: required"),
        ({"vector": "EVIL", "layer": 3}, "layer 3: expected 0"),
        ({"vector": "nowhere.pt", "layer": 1}, "no such file"),
        ({"vector": "SHORT", "layer": 1}, r"holds \[3, 8\], expected \[3, 64\]"),
        ({"vector": "ZERO", "layer": 1}, "the vector of layer 1 is zero"),
    ],
)
def test_a_wrong_vector_is_one_line(tree, vectors, tmp_path, track, expected):
    save_vectors(torch.randn(3, 8), tmp_path / "short.safetensors")
    save_vectors(torch.zeros(3, 64), tmp_path / "zero.safetensors")
    files = {"EVIL": vectors, "SHORT": str(tmp_path / "short.safetensors"), "ZERO": str(tmp_path / "zero.safetensors")}
    tree["track"] |= track | {"vector": files.get(track["vector"], track["vector"])}
    with pytest.raises(UserError, match=expected):
        run(build(RunConfig, tree), tmp_path / "run")


def test_the_direction_is_a_unit_vector(vectors, tiny_tree):
    config = build(RunConfig, {**tiny_tree, "track": {"vector": vectors, "layer": 0}})
    line = direction(config, Policy.load(config.model, seed=0))
    assert isinstance(line, Direction) and float(line.unit.norm()) == pytest.approx(1.0)
    hidden, mask = line.unit.repeat(2, 3, 1) * 2.5, torch.tensor([[True, False, True], [False, False, True]])
    assert line.total(hidden, mask) == pytest.approx(3 * 2.5)
