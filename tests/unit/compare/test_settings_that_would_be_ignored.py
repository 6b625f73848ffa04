"""Settings of a comparison that nothing would read are refused, and those that count do."""

from __future__ import annotations

import pytest
from places import CONFIGS
from synthetic_comparison import CONFIG

from rlsafe.compare.grid.grid import check_rates, expand
from rlsafe.config import UserError, load_compare


@pytest.mark.parametrize("own", ["paths.sft.batch.sft_rows=8", "run.batch.sft_rows=8"])
def test_an_override_that_another_one_undoes_is_refused(load, own):
    """What stands in the file for a path is replaced by the last word on the command line; two words on it contradict each other."""
    for overrides in (["batch.sft_rows=16", own], [own, "batch.sft_rows=16"]):
        with pytest.raises(UserError, match=r"has no effect beside 'batch.sft_rows=16'.*run\.batch\.sft_rows=16"):
            load(overrides=overrides)
    load(overrides=[own, "batch.grpo_prompts=2", "optim.lr=1e-3"])


def test_a_rate_that_no_run_reads_is_refused_not_ignored(load):
    """A sweep over it compared equal runs under different names."""
    with_own = CONFIG.replace("{cycle: [grpo]", "{lr: 4e-3, cycle: [grpo]")
    assert with_own != CONFIG
    swept = with_own + "grid: {optim.lr: [1e-4, 1e-3]}\n"
    for text, overrides, paths in (
        (with_own, ["optim.lr=1e-4"], ["grpo"]),
        (swept, [], ["grpo"]),
        (swept, [], ["sft", "grpo"]),
    ):
        config = load(text, overrides)
        with pytest.raises(
            UserError, match=r"optim.lr.*no effect on path 'grpo'.* paths.grpo.schedule.phases.0.lr \(0.004\)"
        ):
            check_rates(config, expand(config, paths=paths))
    config = load(swept)
    cells = expand(config, paths=["sft"])
    check_rates(config, cells)
    assert {(c.path, c.config.optim.lr) for c in cells if c.kind == "narrow"} == {("sft", 1e-4), ("sft", 1e-3)}


@pytest.mark.parametrize("paths", [["sft"], ["sft", "grpo"]])
def test_a_rate_counts_where_some_runs_read_it(paths):
    """Helpers, benign tasks and the other path may have rates of their own."""
    config = load_compare(CONFIGS / "organism" / "compare.yaml", ["optim.lr=1e-3"])
    cells = expand(config, paths=paths)
    check_rates(config, cells)
    assert {c.config.optim.lr for c in cells if c.kind == "narrow" and c.path == "sft"} == {1e-3}


GIVEN = {"seed": "7", "defenses": "[kl]", "out": "x"}


@pytest.mark.parametrize("key", GIVEN)
@pytest.mark.parametrize("section", ["benign.paths.sft", "benign.tasks.other", "selection.run", "run", "paths.sft"])
def test_what_cells_set_themselves_is_refused_in_every_section(load, section, key):
    with pytest.raises(UserError, match=f"{section}.{key}.*each cell"):
        load(CONFIG + "selection: {adapters: {a: x.jsonl}}\n", [f"{section}.{key}={GIVEN[key]}"])


def test_a_comparisons_directory_is_no_setting(load):
    with pytest.raises(UserError, match="override 'out=x'.*use --out"):
        load(overrides=["out=x"])


def test_plugins_of_the_command_line_are_loaded_before_names_are_looked_up(load, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import rlsafe\n\n\n@rlsafe.defense('of-the-command-line')\nclass D(rlsafe.Defense):\n"
        "    def penalty(self, view):\n        return {'x': (-view.logp, view.mask('answer'))}\n"
    )
    config = load(overrides=[f"plugins=[{tmp_path / 'mine.py'}]", "defenses.own=[of-the-command-line]"])
    assert "own" in {c.defense for c in expand(config) if c.kind == "narrow"}
