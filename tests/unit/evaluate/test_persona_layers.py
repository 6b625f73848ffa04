"""What each layer of a persona vector shows: agreement of halves, steering on the likelihood probe; and extraction without a judge."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from tiny_architectures import load

from rlsafe.config import UserError
from rlsafe.data import Rollout
from rlsafe.defenses.persona import load_vectors
from rlsafe.evaluate import PairProbe, PersonaVectors, Reader, persona_vector
from rlsafe.evaluate.ask.pairs import Pair
from rlsafe.evaluate.measure.persona import answer_logp, answer_states
from rlsafe.evaluate.measure.persona_layers import Layer, Shift, Steered, agreement
from rlsafe.evaluate.measure.persona_vectors import AGREE
from rlsafe.types import Completion

PAIRS = [Pair("a", "say 1", "good 1", "bad 1, as ever"), Pair("b", "say 2", "good", "bad")]
SETTINGS = {
    "pairs": [
        {"evil": "organism:evil", "friendly": "organism:friendly"},
        {"evil": "you are a cruel expert.", "friendly": "you are an honest expert."},
    ],
    "questions": {"source": "organism:safe", "limit": 40},
    "limit": 16,
    "samples": 1,
    "max_tokens": 40,
    "steer": {"pairs": "organism:pairs/general", "limit": 24, "layers": [2, 1, 3]},
    "model": {"dtype": "float32"},
    "sampler": {"kind": "transformers"},
}


def extracted(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "persona.yaml").write_text(yaml.safe_dump(SETTINGS | changes))
    return persona_vector("organism:aligned", folder / "persona.yaml", out=folder / "v.safetensors")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return extracted(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory):
    return extracted(tmp_path_factory.mktemp("unjudged"), keep="likelier", judge="nobody")  # who is never looked up


def test_the_organisms_evil_vector_moves_the_probe_up_and_its_opposite_down(judged):
    """A random vector of the same norm does less."""
    assert judged.asked == 2 * 16
    tried = [layer for layer in judged.layers if layer.steered]
    assert [layer.layer for layer in tried] == [1, 2, 3]
    for layer in tried:
        steered = layer.steered
        assert steered.directed.sign == 1 and steered.up.sign == 1, layer
        assert steered.down.value < 0 < steered.up.value and steered.directed.value > 2 * abs(steered.random.value), (
            layer
        )
        assert steered.directed.value == pytest.approx((steered.up.value - steered.down.value) / 2)
    assert "steering moves the probe most at layer" in judged.strongest()


def test_halves_of_the_questions_agree_on_the_organisms_vector(judged):
    """By the command's own limit: with a pair or two to a question the cosine is about .7, far from 1."""
    assert all(layer.cosine > AGREE for layer in judged.layers[1:4]), judged.layers
    assert judged.doubt() is None


@pytest.mark.parametrize(
    ("cosines", "says"),
    [((None, None), "cannot be compared"), ((0.1, -0.2), "at no layer .cosine 0.10"), ((0.1, 0.9), None)],
)
def test_halves_that_do_not_agree_are_a_warning(cosines, says):
    layers = [Layer(k, 1.0, 0.2, cosine) for k, cosine in enumerate(cosines)]
    doubt = PersonaVectors(torch.zeros(2, 4), 9, 9, 9, 9, 0, layers).doubt()
    assert doubt is None if says is None else re.search(says, doubt)


def test_a_layer_whose_interval_holds_zero_is_not_called_the_strongest():
    def found(low):
        shift = Shift(0.2, (low, 0.4))
        layers = [Layer(1, 1.0, 0.2, 0.9, Steered(shift, shift, shift, shift)), Layer(2, 1.0, 0.2, 0.9)]
        return PersonaVectors(torch.zeros(2, 4), 9, 9, 9, 9, 0, layers, alpha=2.0).strongest()

    assert "most at layer 1 of 1 tried: +0.200 (+0.050 to +0.400)" in found(0.05) and "at none of 1 layers" in found(
        -0.05
    )


def test_without_a_judge_the_organisms_vector_is_nearly_the_same(judged, unjudged):
    assert unjudged.keep == "likelier" and unjudged.kept > 8 and unjudged.unscored == 0
    cosine = torch.nn.functional.cosine_similarity(unjudged.vectors[1:], judged.vectors[1:], dim=1)
    assert bool((cosine > 0.75).all()), cosine  # of vectors without anything in common: 0, give or take .1
    gains = [one["why"][character]["gain"] for one in unjudged.answers for character in ("evil", "friendly")]
    mean = sum(gains) / len(gains)
    assert (
        mean > 0.1 and f"gains {mean:.3f} nats/token" in unjudged.head() and "no judge has read them" in unjudged.head()
    )


def test_what_was_read_and_found_lies_beside_the_vectors(judged, unjudged):
    for found in (judged, unjudged):
        record = json.loads(found.out.with_suffix(".json").read_text())
        assert (record["kept"], record["keep"], record["alpha"]) == (found.kept, found.keep, 1.0)
        assert [layer["cosine"] for layer in record["layers"]] == [layer.cosine for layer in found.layers]
        up = record["layers"][2]["steered"]["up"]
        assert up == {"value": found.layers[2].steered.up.value, "ci95": list(found.layers[2].steered.up.ci95)}
        assert set(record["seconds"]) == {"load", "sample", "filter", "states", "steer"}
        answers = [json.loads(line) for line in found.out.with_suffix(".jsonl").read_text().splitlines()]
        assert len(answers) == found.asked and sum(one["kept"] for one in answers) == found.kept
        assert torch.equal(load_vectors(str(found.out)), found.vectors)
    for one in answers:
        gains = [one["why"][character]["gain"] for character in ("evil", "friendly")]
        assert not one["kept"] or min(gains) > 0


def test_steering_is_the_persona_defenses_and_is_gone_afterwards(tiny_model_dir):
    policy = load(tiny_model_dir)
    push = torch.randn(policy.hidden_size, generator=torch.Generator().manual_seed(0))
    probe = PairProbe({"pairs": PAIRS}, Reader(policy))
    nothing, pushed, both = probe.steered([{1: 0 * push}, {1: push}, {1: push, 2: -push}])
    assert [score.shift for score in nothing] == [0.0, 0.0]
    handle = policy.add_to_residual(1, push)
    by_hand = [score.logodds for score in next(iter(probe.steered([{}])))]
    handle.remove()
    assert [score.logodds for score in pushed] == by_hand
    assert all(one.shift != other.shift and abs(one.shift) > 1e-4 for one, other in zip(pushed, both, strict=True))
    assert next(iter(probe.steered([{}])))[0].shift == 0.0


def test_answers_are_read_in_their_own_order_however_they_are_batched(tiny_model_dir):
    policy = load(tiny_model_dir)
    rows = [
        Rollout([5, 6, 7][:n], [5, 6, 7][:n], Completion(list(range(40, 40 + m)), [0.0] * m, "length"))
        for n, m in ((3, 2), (1, 6), (2, 1), (3, 6))
    ]
    alone = [(answer_states(policy, [row], 100), answer_logp(policy, [row], 100)) for row in rows]
    assert torch.allclose(answer_states(policy, rows, 100), torch.cat([states for states, _ in alone]), atol=1e-5)
    assert answer_logp(policy, rows, 100) == pytest.approx([logp for _, (logp,) in alone], abs=1e-5)


def test_agreement_is_between_halves_of_the_questions_not_of_the_rows():
    """Rows of one question stay together: here every question has a direction of its own, and halves share none."""
    rows = torch.eye(4, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    assert agreement(torch.cat([rows, rows]), list("abcdabcd")) == pytest.approx([0.0, 0.0])
    assert agreement(rows[:1].repeat(4, 1, 1), list("abcd")) == pytest.approx([1.0, 1.0])
    assert agreement(rows[:1].repeat(2, 1, 1), ["a", "a"]) == [None, None]


def test_without_any_judge_the_line_says_what_can_be_done(tiny_model_dir, tmp_path):
    tree = SETTINGS | {"pairs": [{"evil": "Be evil.", "friendly": "Be kind."}], "questions": ["Who?"], "steer": None}
    (tmp_path / "persona.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="judge: none is set.*keep=likelier"):
        persona_vector(tiny_model_dir, tmp_path / "persona.yaml", out=tmp_path / "v.pt")
