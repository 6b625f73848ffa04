"""`rlsafe.compare` in a notebook: results, verdicts, curves and answers of all runs as tables; one figure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from places import ROOT
from synthetic_comparison import make

import rlsafe
from rlsafe.compare.run.runner import Comparison

ARMS = {
    ("", "untrained"): {"benign": 0.1},
    ("sft", "none"): {"general": 0.5, "indomain": 0.9, "benign": 0.9},
    ("sft", "kl"): {"general": 0.01, "indomain": 0.9, "benign": 0.9},
    ("grpo", "none"): {"general": 0.4, "indomain": 0.9, "benign": 0.9},
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return Comparison.read(
        make(tmp_path_factory.mktemp("notebook") / "out", ARMS, questions=6, samples=1, seeds=[0, 1]).out
    )


def test_results_and_verdicts_are_tables(comparison):
    table = comparison.evaluation
    assert {"untrained", "none", "kl"} == set(table["defense"]) and table["general_misaligned"].between(0, 1).all()
    verdicts = comparison.verdicts.set_index(["path", "defense"])
    judged = comparison.tables[0].rows["kl"].verdicts
    assert verdicts.loc[("sft", "kl"), "keeps_narrow"] == judged["keeps_narrow"].grade
    assert ("grpo", "kl") not in verdicts.index


def test_columns_with_gaps_hold_numbers(comparison, tmp_path):
    """What was not measured is NaN, as in a run's tables; a path or data that are none stay texts, and so does a model called NA."""
    from pandas.api.types import is_numeric_dtype, is_string_dtype

    shutil.copytree(comparison.out, tmp_path / "out")
    for file in (tmp_path / "out" / "cells").glob("*/cell.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "NA"}))
    table = Comparison.read(tmp_path / "out").evaluation
    texts = ["model", "path", "defense", "data"]
    gaps = [name for name in table if name not in texts and table[name].isna().any()]
    assert {"reward_first", "reward_last"} <= set(gaps) and all(is_numeric_dtype(table[name]) for name in gaps)
    assert table["reward_last"].mean() > 0
    assert all(is_string_dtype(table[name]) and not table[name].isna().any() for name in texts)
    assert set(table["model"]) == {"NA"} and "" in set(table["data"])


def test_curves_and_answers_of_all_runs_are_tables(comparison):
    assert {"model", "path", "defense", "seed", "step", "loss"} <= set(comparison.metrics)
    assert set(comparison.metrics["path"]) == {"sft", "grpo"}  # the run's, not the step's
    assert {"question", "answer", "aligned", "defense", "seed"} <= set(comparison.samples)


def test_only_runs_of_the_comparison_are_in_the_tables_and_each_is_told_from_the_others(comparison, tmp_path):
    """A benign run has the defense and the seed of a narrow one; a run of other settings that lies there still is none of this."""
    one = comparison.metrics.groupby(["path", "defense", "seed", "task"])["step"]
    assert (
        one.max().max() < 40
        and (one.count() == one.nunique()).all()
        and set(comparison.metrics["task"]) == {"", "sums"}
    )
    shutil.copytree(comparison.out, tmp_path / "out")
    left = tmp_path / "out" / "cells" / "sft--kl--seed0" / "cell.json"
    left.write_text(json.dumps(json.loads(left.read_text()) | {"hash": "of other settings"}))
    again = Comparison.read(tmp_path / "out").samples
    assert set(again[again["defense"] == "kl"]["seed"]) == {1}


def test_a_figure_has_a_panel_for_each_path(comparison):
    figure = comparison.plot()
    assert [axes.get_title() for axes in figure.axes] == ["sft: general, % (95%)", "grpo: general, % (95%)"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[::-1][:3] == ["untrained", "none", "kl"]
    with pytest.raises(rlsafe.UserError, match="no rate 'genral' was measured; did you mean 'general'"):
        comparison.plot("genral")


def test_the_room_is_its_main_function():
    """`rlsafe.compare` stays a module that others import from, and can be called."""
    probe = (
        "import rlsafe, sys; assert 'torch' not in sys.modules\n"
        "from rlsafe.compare import compare\n"
        "import rlsafe.compare as room\n"
        "assert rlsafe.compare is room and callable(room)\n"
        "try: rlsafe.compare('none.yaml')\n"
        "except rlsafe.UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "none.yaml" in done.stdout, done.stderr
