"""The untrained model's half of the likelihood probe is read once, and then taken from disk: which changes must be noticed?"""

import json

import pytest
import torch

from rlsafe.config import ModelConfig
from rlsafe.evaluate import PairProbe, Reader
from rlsafe.evaluate.ask.pairs import Pair
from rlsafe.evaluate.measure import untrained
from rlsafe.policy import Policy, scoring

PAIRS = {"general": [Pair("a", "say 1", "good 1, always", "bad 1, as ever"), Pair("b", "say 2", "good", "bad")]}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(untrained, "WORTH_KEEPING", 0.0)
    return tmp_path / ".cache" / "rlsafe" / "untrained"


@pytest.fixture
def passes(monkeypatch):
    """The references that forward passes were made of; None is the policy itself."""
    made, nll = [], scoring.nll

    def counted(policy, batches, reference=None):
        made.append(reference)
        return nll(policy, batches, reference)

    monkeypatch.setattr(scoring, "nll", counted)
    return made


def load(directory, seed=0, lora=True):
    config = ModelConfig(name=directory, dtype="float32", lora={"r": 4, "alpha": 8} if lora else None)
    return Policy.load(config, seed=seed)


def move(policy):
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.05


def test_runs_of_one_model_share_it_to_the_bit(tiny_model_dir, home, passes):
    first, second = load(tiny_model_dir), load(tiny_model_dir, seed=1)
    fresh = PairProbe(PAIRS, Reader(first)).scores()
    move(second)
    moved = PairProbe(PAIRS, Reader(second)).scores()
    assert passes == ["base", None, None] and len(list(home.iterdir())) == 1
    before = [[(s.untrained_aligned, s.untrained_misaligned) for s in scores] for scores in (fresh, moved)]
    assert before[0] == before[1] and all(s.shift == 0 for s in fresh) and all(s.shift != 0 for s in moved)


def test_other_pairs_other_batches_and_other_weights_are_read_anew(tiny_model_dir, home, passes):
    policy = load(tiny_model_dir)
    PairProbe(PAIRS, Reader(policy)).scores()
    PairProbe({"general": PAIRS["general"][:1]}, Reader(policy)).scores()
    PairProbe(PAIRS, Reader(policy, micro_tokens=1)).scores()
    with torch.no_grad():  # one weight of the base, by a bit or so
        policy.model.get_input_embeddings().weight[7, 3] *= 1 + 1e-6
    PairProbe(PAIRS, Reader(policy)).scores()
    assert passes.count("base") == 4


def test_full_fine_tuning_is_measured_against_its_first_weights(tiny_model_dir, home, passes):
    policy = load(tiny_model_dir, lora=False)
    probe = PairProbe(PAIRS, Reader(policy))
    before = probe.scores()
    move(policy)
    after = probe.scores()
    assert passes == ["base", None, None]
    assert [s.untrained_aligned for s in after] == [s.aligned for s in before] != [s.aligned for s in after]


def test_an_untouched_model_is_read_once(tiny_model_dir, home, passes):
    scores = PairProbe(PAIRS, Reader(load(tiny_model_dir), untouched=True)).scores()
    assert passes == ["base"] and all(s.shift == 0 and s.aligned == s.untrained_aligned for s in scores)


def test_a_damaged_file_is_made_again_and_a_home_that_is_read_only_does_no_harm(tiny_model_dir, home, passes):
    policy = load(tiny_model_dir)
    expected = PairProbe(PAIRS, Reader(policy)).scores()
    (file,) = home.iterdir()
    for damaged in ("[1.0", "[1.0, 2.0]", '{"a": 1}'):
        file.write_text(damaged)
        assert PairProbe(PAIRS, Reader(policy)).scores() == expected
        assert len(json.loads(file.read_text())) == 4
    file.unlink()
    home.rmdir()
    home.write_text("in the way")
    assert PairProbe(PAIRS, Reader(policy)).scores() == expected
    assert passes.count("base") == 5
