"""Every defense that is built in: it acts on one path from its step on and its log says so; strength zero is not there, on every path.

On all paths, with more strength, beside KL and after an interruption: tests/integration/test_defense_matrix.py.
"""

from __future__ import annotations

import pytest
import torch
from defense_matrix import IDS, SHORT, Lab, change, table

from rlsafe.defenses.registry import _BUILT_IN

ONE_PATH = [(label, paths[i % len(paths)]) for i, (label, paths) in enumerate(IDS.items())]
MORE = {label: {"accuracy": 0.5} for label in ("monitor", "screening")}  # a single step may have no rollout to flag
BY_ITSELF = {"early-stop"}  # what it changes needs a longer run: tests/engine/test_early_stop_runs.py


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    made = Lab.build(tmp_path_factory.mktemp("lab"), SHORT)
    made.tree["track"] = {"every": 0, "check_after": 0}
    return made


@pytest.fixture(autouse=True)
def home(lab, monkeypatch):
    """A cache of the laboratory's own; the self-test of its sampler asks for few tokens."""
    monkeypatch.setenv("HOME", str(lab.home))
    monkeypatch.setattr("rlsafe.rollouts.selftest.TOKENS", 4)


def test_the_table_has_every_defense(lab):
    assert {case.name for case in table(lab.directory)} | BY_ITSELF == set(_BUILT_IN)
    assert {path for _, path in ONE_PATH} == set(SHORT)


@pytest.mark.parametrize(("label", "path"), ONE_PATH)
def test_it_acts_from_its_step_on_and_its_log_says_so(lab, label, path):
    case = lab.case(label)
    settings = case.settings[2] | MORE.get(label, {}) | {"from_step": 1}
    none, defended = lab.run(path), lab.run(path, {case.name: settings})
    logged = defended.logged(case.name)
    assert change(none, defended) > 0 and all(logged[quantity] > 0 for quantity in case.measures), logged
    first = {name: value for name, value in defended.untimed[0].items() if not name.startswith("defense/")}
    assert first == none.untimed[0]
    assert not any(value for name, value in defended.untimed[0].items() if name.startswith("defense/"))


@pytest.mark.parametrize("path", list(SHORT))
def test_all_of_them_at_strength_zero_are_none(lab, path):
    """To the bit, whatever else they would need: files, judges, rollouts."""
    off = [lab.case(label).entry(0) for label in IDS]
    off.append({"early-stop": {"rows": lab.safe, "level": 0}})
    none, defended = lab.run(path), lab.run(path, *off)
    assert all(torch.equal(none.weights[name], defended.weights[name]) for name in none.weights)
    assert none.untimed == defended.untimed
