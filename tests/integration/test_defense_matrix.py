"""Every defense on every path: it acts, more strength does more, none does nothing, KL composes, a resumed run is the same run.

The table is in tests/support/defense_matrix.py. Each property is tested on every defense and on every path here; all combinations
of the two are run with `-m slow`.
"""

from __future__ import annotations

import pytest
import torch
from defense_matrix import IDS, KL, Lab, change


def every(offset: int):
    """(defense, path) for all of both: a third of them, which has every defense and every path, in the normal suite."""
    combinations = [
        pytest.param(
            label, path, id=f"{label}-{path}", marks=() if (i + offset) % len(paths) == j else pytest.mark.slow
        )
        for i, (label, paths) in enumerate(IDS.items())
        for j, path in enumerate(paths)
    ]
    return pytest.mark.parametrize(("label", "path"), combinations)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab.build(tmp_path_factory.mktemp("lab"))


@pytest.fixture(autouse=True)
def home(lab, monkeypatch):
    """A cache of the laboratory's own."""
    monkeypatch.setenv("HOME", str(lab.home))


@every(0)
def test_it_acts_and_says_how_much(lab, label, path):
    """Non-zero gradient or effect, on both paths of a mixed run too; what the log says is there in the weights."""
    case = lab.case(label)
    none, defended = lab.run(path), lab.run(path, case.entry(1))
    assert change(none, defended) > 1e-3
    seen = {record["path"] for record in defended.records}
    assert seen == ({"sft", "grpo"} if path == "mixed" else {path})
    for one in seen - ({"sft"} if path == "mixed" and (case.at_end or case.rollouts) else set()):
        logged = defended.logged(case.name, one)
        assert logged and all(logged[quantity] > 0 for quantity in case.measures), (one, logged)


@every(1)
def test_more_strength_has_more_effect(lab, label, path):
    case = lab.case(label)
    none = lab.run(path, world=case.world)
    zero, weak, strong = (case.effect(none, lab.run(path, case.entry(i), world=case.world)) for i in range(3))
    assert zero == 0.0 < weak < strong, (weak, strong)


@every(2)
def test_strength_zero_is_not_there_at_all(lab, label, path):
    """The adapter has the bits of the run without it: alone, and beside another defense."""
    off = lab.case(label).entry(0)
    for others in ([], [KL]):
        without, with_it = lab.run(path, *others), lab.run(path, *others, off)
        assert all(torch.equal(without.weights[name], with_it.weights[name]) for name in without.weights)
        assert without.untimed == with_it.untimed
    assert change(lab.run(path), lab.run(path, KL)) > 1e-3


@every(0)
def test_it_composes_with_kl(lab, label, path):
    """Both act, and the loss is the sum of its terms, each with its own weight."""
    case = lab.case(label)
    both = lab.run(path, case.entry(1), KL)
    assert change(both, lab.run(path, KL)) > 1e-3 and change(both, lab.run(path, case.entry(1))) > 1e-3
    kl = "kl-2" if case.name == "kl" else "kl"
    assert both.logged(kl)["full"] > 0 and all(both.logged(case.name)[quantity] > 0 for quantity in case.measures)
    weights = {kl: KL["kl"]["weight"], case.name: case.settings[1].get("weight", 0.0)}
    for record in both.records:
        terms = sum(record.get(f"loss/{one}", 0.0) for one in ("sft", "grpo"))
        for key, value in record.items():
            name, _, quantity = key.removeprefix("defense/").partition("/")
            if key.startswith("defense/") and quantity in ("full", "distance", "excess"):
                terms += weights[name] * value
        assert record["loss"] == pytest.approx(terms, abs=1e-5)


@every(1)
def test_a_resumed_run_is_the_uninterrupted_one(lab, label, path):
    """Trap 13: stream positions, sampler seeds, snapshots and a defense's own state survive; so does losing its cache."""
    entries = [lab.case(label).resumed, KL]
    whole = lab.run(path, *entries)
    for stop_after in (1, 3):
        cut = lab.run(path, *entries, stop_after=stop_after)
        assert all(torch.equal(whole.weights[name], cut.weights[name]) for name in whole.weights), stop_after
        assert whole.untimed == cut.untimed and whole.report == cut.report
    assert change(whole, lab.run(path, KL)) > 1e-3
