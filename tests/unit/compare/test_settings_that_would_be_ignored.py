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


@pytest.mark.parametrize(
    ("own", "part"),
    [
        ("paths.sft.optim={lr: 1e-2}", ""),
        ("paths={sft: {optim: {lr: 1e-2}}, grpo: {}}", " in part"),
        ("paths.sft.optim={eps: 1e-6, lr: 1e-2}", " in part"),
        ("benign.tasks={sums: {optim: {lr: 1e-2}}}", ""),
    ],
)
def test_nor_is_one_undone_that_gives_a_section(load, own, part):
    with pytest.raises(UserError, match=rf"^override '{own}' has no effect{part} beside 'optim.lr=1e-4'"):
        load(overrides=[own, "optim.lr=1e-4"])
    load(overrides=[own, "optim.warmup=3"])
    load(overrides=["aligned={data: {narrow: {source: good2.jsonl}}}", "data.narrow.source=bad2.jsonl"])


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
    config = load(with_own, ["optim={lr: 1e-4, eps: 1e-6}"])
    with pytest.raises(UserError, match="'optim={lr.*no effect in part on path 'grpo'"):
        check_rates(config, expand(config, paths=["grpo"]))
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


def test_an_override_that_a_section_wins_over_is_not_refused(load):
    """Data of the aligned arm, and the schedule of a warm-up, are their own whatever the cells get."""
    load(overrides=["aligned.data.narrow.source=good2.jsonl", "data.narrow.source=bad2.jsonl"])
    load(CONFIG + "warmup: {}\n", ["warmup.schedule.steps=8", "schedule.steps=20"])


@pytest.mark.parametrize("section", ["warmup", "selection.run", "benign.tasks.sums", "benign.paths.sft"])
def test_words_of_one_command_line_contradict_each_other_in_every_section(load, section):
    text = CONFIG + "warmup: {}\nselection: {adapters: {a: x.jsonl}}\n"
    with pytest.raises(UserError, match=rf"'{section}.optim.lr=1e-3' has no effect beside 'optim.lr=1e-4'"):
        load(text, [f"{section}.optim.lr=1e-3", "optim.lr=1e-4"])


MODELS = CONFIG + "models: {one: {model: {name: a, lora: null}}, other: {model: {name: b}}, third: {}}\n"


@pytest.mark.parametrize("override", ["model.name=organism:base", "model={name: c}"])
def test_models_that_an_override_makes_the_same_are_refused(load, override):
    """Three names, one model: differences between them would be seeds."""
    with pytest.raises(
        UserError, match=rf"'{override}' leaves no difference between the models '.*expected models.o.*{override}, or"
    ):
        expand(load(MODELS, ["batch.micro_rows=2", override]))
    assert len({c.config.model.name for c in expand(load(MODELS, ["model.dtype=float32"])) if c.kind == "narrow"}) == 3


@pytest.mark.parametrize(
    ("models", "override"),
    [
        ("{full: {model: {lora: null}}, usual: {}}", "model.lora.r=4"),
        ("{rank8: {model: {lora: {r: 8}}}, usual: {}}", "model.lora.r=4"),
        ("{half: {model: {dtype: bfloat16}}, usual: {}}", "model.dtype=float32"),
    ],
)
def test_models_without_the_setting_are_made_the_same_too(load, models, override):
    text = f"{CONFIG}models: {models}\n"
    with pytest.raises(UserError, match=rf"'{override}' leaves no difference between the models '.*' and 'usual'"):
        expand(load(text, [override]))
    assert {c.model for c in expand(load(text, ["track.every=0"]))} == {*load(text).models}


def test_an_override_beside_which_models_still_differ_is_for_all(load):
    text = CONFIG + (
        "models: {a: {model: {name: A}, batch: {micro_rows: 4}}, b: {model: {name: B}, batch: {micro_rows: 8}}}\n"
    )
    found = {(c.model, c.config.batch.micro_rows) for c in expand(load(text, ["batch.micro_rows=2"]))}
    assert found == {("a", 2), ("b", 2)}


@pytest.mark.parametrize("override", ["batch.sft_rows=8", "batch={sft_rows: 8}"])
@pytest.mark.parametrize("values", ["[8, 16]", "[16]"])
def test_what_the_grid_sweeps_is_not_undone(load, override, values):
    with pytest.raises(UserError, match=rf"override '{override}': 'grid' sweeps batch.sft_rows"):
        load(overrides=[f"grid.batch.sft_rows={values}", override])
    swept = load(overrides=[f"grid.batch.sft_rows={values}", "batch.grpo_prompts=2"])
    assert {c.config.batch.sft_rows for c in expand(swept) if c.kind == "narrow"} == set(
        map(int, values[1:-1].split(","))
    )


def test_a_value_of_the_grid_is_not_changed_from_within(load):
    with pytest.raises(UserError, match="'grid' sweeps model.lora"):
        load(overrides=["grid={model.lora: [null, {r: 8}]}", "model.lora.r=4"])
    load(overrides=["grid={rewards: [[{fn: a}], [{fn: b}]]}", "rewards.0.weight=2"])


def test_paths_that_an_override_makes_the_same_are_refused(load):
    overrides = ["schedule={steps: 4, phases: [{cycle: [sft]}]}"]
    expected = r"^override 'schedule=.*' leaves no difference between the paths 'sft' and 'grpo'; .*--paths grpo"
    rewarded = CONFIG.replace("grpo: {schedule", 'grpo: {rewards: [{fn: "organism:good"}], schedule')
    assert rewarded != CONFIG
    for text in (CONFIG, rewarded):  # what pays is nothing to supervised runs
        with pytest.raises(UserError, match=expected):
            expand(load(text, overrides))
    without = CONFIG.replace("model: {name: tiny}", "model: {}")
    with pytest.raises(UserError, match=expected):  # nothing is known of a grid without the other words
        expand(load(without, [*overrides, "model.name=tiny"]))
    assert {c.path for c in expand(load(overrides=overrides), paths=["sft"]) if c.kind == "narrow"} == {"sft"}


SFT = "schedule={steps: 4, phases: [{cycle: [sft], lr: 1e-3}]}"


@pytest.mark.parametrize(
    "own", ["track: {every: 6}", "checkpoint: {every: 2}", "grpo: {max_tokens: 8}", "batch: {grpo_prompts: 2}", "optim: {lr: 1e-2}"]
)  # fmt: skip
def test_what_supervised_runs_do_not_read_tells_no_paths_apart(load, own):
    text = CONFIG.replace("grpo: {schedule", f"grpo: {{{own}, schedule")
    assert text != CONFIG
    with pytest.raises(UserError, match="leaves no difference between the paths 'sft' and 'grpo'"):
        expand(load(text, [SFT]))
    expand(load(text, ["evaluate.limit=5"]))


def test_what_a_defense_reads_of_grpo_tells_supervised_runs_apart(load):
    text = CONFIG.replace("grpo: {schedule", "grpo: {grpo: {max_tokens: 8}, schedule")
    expand(load(text, [SFT]), defenses=["kl"])  # answers that a defense samples are of this length


@pytest.mark.parametrize("paths", [None, ["sft", "mixed"]])
def test_paths_of_the_shipped_comparison_are_not_made_the_same(paths):
    config = load_compare(CONFIGS / "organism" / "compare.yaml", ["schedule={steps: 4, phases: [{cycle: [sft]}]}"])
    with pytest.raises(UserError, match="leaves no difference between the paths 'sft' and '(grpo|mixed)'"):
        expand(config, paths=paths)


SHORT = "schedule: {steps: 3, phases: [{cycle: [sft]}]}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (CONFIG.replace("{steps: 20, phases: [{cycle: [grpo]}]}", "{steps: 20, phases: [{cycle: [sft]}]}"), "relapse"),
        (CONFIG.replace("aligned: {", f"aligned: {{{SHORT}, "), "aligned"),
        (CONFIG.replace("sums: {", f"sums: {{{SHORT}, "), "benign"),
        (CONFIG.replace("aligned:", "narrow: false\naligned:").replace("sums: {", f"sums: {{{SHORT}, "), "benign"),
    ],
    ids=["a last phase in common", "an aligned schedule", "a schedule of a task", "the same without narrow runs"],
)
def test_runs_that_are_equal_in_the_file_are_not_blamed_on_an_override(load, text, kind):
    assert text != CONFIG
    relapse = 2 if kind == "relapse" else 0
    given = [c for c in expand(load(text, ["track.every=0"]), relapse=relapse) if c.kind == kind]
    runs: dict[str, set[str]] = {}
    for cell in given:
        runs.setdefault(cell.config.model_dump_json(), set()).add(cell.path)
    assert {"sft", "grpo"} in runs.values()
