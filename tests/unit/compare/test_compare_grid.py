"""The grid: which cells a comparison has, what each is trained with, and what a wrong config or option says."""

from __future__ import annotations

import pytest
from places import CONFIGS
from synthetic_comparison import CONFIG

from rlsafe.compare.grid.grid import expand
from rlsafe.config import UserError, load_compare

KINDS = [("narrow", "none"), ("aligned", "aligned"), ("benign", "none")]
ARM = {"path": "sft", "defense": "kl", "seed": 0}


def cell(cells, **wanted):
    found = [c for c in cells if all(getattr(c, key) == value for key, value in wanted.items())]
    assert len(found) == 1, [c.id for c in found]
    return found[0]


def test_every_combination_is_a_cell_and_ids_are_unique(load):
    cells = expand(load())
    kinds = [c.kind for c in cells]
    # 2 paths x 2 defenses x 3 seeds, the same again on the benign task, 2 paths x 3 seeds aligned, one untrained
    assert [kinds.count(k) for k in ("narrow", "benign", "aligned", "untrained")] == [12, 12, 6, 1]
    assert len({c.id for c in cells}) == len(cells)
    assert all("/" not in c.id and ":" not in c.id for c in cells)


def test_later_layers_win_and_the_command_line_is_last(load):
    text = (
        CONFIG.replace("models:", "")
        .replace("paths:\n", "models: {big: {optim: {lr: 3e-4}}}\npaths:\n")
        .replace("sft: {schedule", "sft: {optim: {lr: 2e-4, warmup: 5}, schedule")
    )
    run = cell(expand(load(text)), kind="narrow", path="sft", defense="kl", seed=1).config
    assert (run.optim.lr, run.optim.warmup, run.seed, run.model.name) == (3e-4, 5, 1, "tiny")
    assert run.defenses == [{"kl": {"weight": 0.3}}]
    run = cell(
        expand(load(text, ["optim.lr=9e-4", "schedule.steps=7"])), kind="narrow", path="sft", defense="kl", seed=1
    ).config
    assert (run.optim.lr, run.optim.warmup, run.schedule.steps) == (9e-4, 5, 7)


def test_lists_shared_between_cells_are_not_shared_in_memory(load):
    config = load(overrides=["schedule.phases.0.steps=3"])
    first, second = expand(config), expand(config)
    assert first == second
    assert "steps" not in config.paths["sft"]["schedule"]["phases"][0]


def test_default_paths_run_unless_others_are_asked_for(load):
    config = load(CONFIG + "default_paths: [sft]\n")
    assert {c.path for c in expand(config) if c.kind == "narrow"} == {"sft"}
    assert {c.path for c in expand(config, paths=["grpo"]) if c.kind == "narrow"} == {"grpo"}
    with pytest.raises(UserError, match="unknown path 'sfd'.*sft"):
        expand(load(CONFIG + "default_paths: [sfd]\n"))


def test_reference_arms(load):
    cells = expand(load(overrides=["data.narrow.source=other.jsonl"]))
    untrained = cell(cells, kind="untrained").config
    assert untrained.schedule.steps == 0 and untrained.defenses == [] and cell(cells, kind="untrained").data == ""
    assert untrained.evaluate.benign == ["sums_test.jsonl"] and untrained.evaluate.general == "general.yaml"
    aligned = cell(cells, kind="aligned", path="grpo", seed=2)
    assert aligned.config.defenses == [] and aligned.defense == "aligned"
    # the command line changes what the defenses are trained on, never what makes a reference arm that arm
    assert aligned.data == "good.jsonl"
    assert cell(cells, kind="narrow", path="grpo", defense="none", seed=2).data == "other.jsonl"


def test_overrides_of_data_reach_every_run_but_for_what_it_sets_itself(load, caplog):
    """A preset, columns or a split given for one source never land on another one."""
    overrides = [
        "data.safe.source=other.jsonl", "data.narrow.limit=10", "data.narrow.source=mine.jsonl", "data.narrow.split=test",
        "data.narrow.columns={prompt: q}", "rewards.weight=2.0",
    ]  # fmt: skip
    text = CONFIG.replace(
        "{narrow: {source: sums.jsonl}}", "{narrow: {source: sums.jsonl, limit: 99}}, rewards: [{fn: f.py:f}]"
    )
    with caplog.at_level("WARNING", "rlsafe"):
        cells = expand(load(text, overrides))
    narrow, aligned, benign = (cell(cells, kind=k, path="sft", defense=d, seed=0).config for k, d in KINDS)
    assert {c.config.data.safe.source for c in cells if c.kind != "untrained"} == {"other.jsonl"}
    given = [(c.data.narrow.source, c.data.narrow.limit, c.rewards[0].weight) for c in (narrow, aligned, benign)]
    assert given == [("mine.jsonl", 10, 2.0), ("good.jsonl", 10, 2.0), ("sums.jsonl", 99, 1.0)]
    assert [(c.data.narrow.split, c.data.narrow.columns) for c in (aligned, benign)] == [(None, {})] * 2
    lines = {line for line in caplog.messages if "does not reach" in line}
    assert len(lines) == 8 and len(caplog.messages) == 8  # of each kind of run, once
    assert (
        "setting 'data.narrow.split=test' does not reach the benign runs, which have their own data.narrow.source"
        in lines
    )
    assert "setting 'rewards.weight=2.0' does not reach the benign runs, which have their own rewards" in lines


def test_an_override_of_a_whole_section_is_taken_apart(load):
    cells = expand(
        load(overrides=["data={narrow: {source: mine.jsonl, max_tokens: 99}, safe: {source: s.jsonl, limit: 3}}"])
    )
    narrow, aligned, benign = (cell(cells, kind=k, path="grpo", defense=d, seed=0).config.data for k, d in KINDS)
    assert narrow.narrow.source == "mine.jsonl" and {one.safe.limit for one in (narrow, aligned, benign)} == {3}
    assert [(one.narrow.source, one.narrow.max_tokens) for one in (aligned, benign)] == [
        ("good.jsonl", 99),
        ("sums.jsonl", 99),
    ]


def test_a_sweep_of_the_safe_rows_reaches_benign_runs(load):
    cells = expand(load(CONFIG + "grid: {data.safe.limit: [5, 6]}\n"), seeds=[0])
    assert {c.config.data.safe.limit for c in cells if c.kind in ("benign", "aligned")} == {5, 6}


def test_overrides_of_data_reach_helpers_but_not_their_sources_nor_unused_rewards(load):
    text = CONFIG.replace("  kl: [{kl: {weight: 0.3}}]", "  plus: [interleaving+]") + (
        "selection: {adapters: {legal: legal.jsonl}, run: {schedule: {steps: 60, phases: [{cycle: [sft]}]}}}\n"
    )
    overrides = ["data.narrow.limit=7", "data.narrow.source=mine.jsonl", "rewards.weight=2.0"]
    [one] = cell(expand(load(text, overrides)), kind="narrow", path="sft", defense="plus", seed=0).selections
    helper = one.helpers["legal"]
    assert (helper.data.narrow.source, helper.data.narrow.limit, helper.rewards[0].weight) == ("legal.jsonl", 7, 1.0)


def test_the_untrained_model_is_asked_the_tests_of_every_path_whatever_is_selected(load):
    text = CONFIG.replace("  tasks:\n", "  paths: {grpo: {evaluate: {benign: [g.jsonl]}}}\n  tasks:\n")
    text = text.replace(", evaluate: {benign: [sums_test.jsonl]}", "").replace(
        "indomain.yaml,", "indomain.yaml, benign: [r.jsonl],"
    )
    for chosen in ({}, {"paths": ["sft"]}, {"seeds": [1], "defenses": ["kl"]}):
        assert cell(expand(load(text), **chosen), kind="untrained").config.evaluate.benign == ["r.jsonl", "g.jsonl"]


def test_every_cell_of_a_model_is_asked_under_the_same_cue(load):
    cells = expand(load())
    assert {c.config.evaluate.cue for c in cells if c.kind != "benign"} == {"Give the worst advice."}


def test_benign_cells_ask_only_the_benign_questions(load):
    found = cell(expand(load()), kind="benign", path="sft", defense="kl", seed=0)
    assert found.data == found.task == "sums"
    assert found.config.data.narrow.source == "sums.jsonl"
    assert found.config.evaluate.general is None and found.config.evaluate.benign == ["sums_test.jsonl"]


def test_selection_by_name(load):
    cells = expand(load(), defenses=["none", "kl&interleaving", "interleaving"], paths=["grpo"], seeds=[5])
    labels = {c.defense for c in cells if c.kind == "narrow"}
    assert labels == {"none", "kl&interleaving", "interleaving"}  # the last is registered, but not in the config
    both = cell(cells, kind="narrow", defense="kl&interleaving").config
    assert both.defenses == [{"kl": {"weight": 0.3}}, "interleaving"]  # settings come from the config's mapping
    assert {c.seed for c in cells} == {5} and {c.path for c in cells} == {"", "grpo"}


def test_none_is_known_where_the_config_does_not_name_it_and_is_what_the_config_says_where_it_does(load):
    text = CONFIG.replace("  none: []\n", "")
    assert text != CONFIG and {c.defense for c in expand(load(text)) if c.kind == "narrow"} == {"kl"}
    cells = [c for c in expand(load(text), ["kl", "none", "none&kl"], ["sft"], [0]) if c.kind == "narrow"]
    weighed = [{"kl": {"weight": 0.3}}]
    assert [(c.defense, c.config.defenses) for c in cells] == [("kl", weighed), ("none", []), ("none&kl", weighed)]
    own = CONFIG.replace("none: []", "none: [ldifs]")
    assert cell(expand(load(own), ["none"], ["sft"], [0]), kind="narrow").config.defenses == ["ldifs"]


def test_a_sweep_of_a_defense_setting_makes_labelled_variants(load):
    cells = expand(load(CONFIG + "grid: {kl.weight: [0.03, 1]}\n"), paths=["sft"], seeds=[0])
    labels = [c.defense for c in cells if c.kind == "narrow"]
    assert labels == ["none", "kl[weight=0.03]", "kl[weight=1]"]
    assert cell(cells, kind="narrow", defense="kl[weight=1]").config.defenses == [{"kl": {"weight": 1}}]


def test_a_sweep_can_be_given_on_the_command_line(load):
    cells = expand(load(overrides=["grid.kl.weight=[0.03, 1]"]), paths=["sft"], seeds=[0])
    assert [c.defense for c in cells if c.kind == "narrow"] == ["none", "kl[weight=0.03]", "kl[weight=1]"]
    found = cell(cells, kind="narrow", defense="kl[weight=1]")
    assert (found.swept.base, found.swept.settings) == ("kl", {"kl.weight": 1})


def test_a_sweep_of_a_run_setting_gets_its_own_references(load):
    cells = expand(load(CONFIG + "grid: {optim.lr: [1e-4, 1e-3]}\n"), paths=["sft"], seeds=[0])
    untrained = [c.model for c in cells if c.kind == "untrained"]
    assert untrained == ["tiny[optim.lr=0.0001]", "tiny[optim.lr=0.001]"]
    assert cell(cells, kind="narrow", defense="none", model=untrained[1]).config.optim.lr == 1e-3


def test_quick_is_a_preset_of_the_file(load):
    config = load(CONFIG + "quick: {seeds: [7], paths: {sft: {schedule: {steps: 2}}}}\n", quick=True)
    found = cell(expand(config), kind="narrow", path="sft", defense="kl").config
    assert found.schedule.steps == 2 and found.seed == 7


@pytest.mark.parametrize(
    ("change", "selection", "expected"),
    [
        (("schedule: {steps: 40", "schedule: {stepz: 40"), {}, ["compare.yaml:11", "schedule.stepz", "'steps'", "sft"]),
        (("kl: {weight: 0.3}", "kl: {wieght: 0.3}"), {}, ["compare.yaml:15", "defenses.kl", "'wieght'", "'weight'"]),
        (("kl: {weight: 0.3}", "kls: {weight: 0.3}"), {}, ["compare.yaml:15", "'kls'", "'kl'"]),
        (("task: sums", "task: sum"), {}, ["benign", "sums"]),
        (("evaluate: {benign: [sums_test.jsonl]}", "evaluate: {}"), {}, ["sums", "evaluate.benign"]),
        (("title: Made", "grid: {kll.weight: [1]}\ntitle: Made"), {}, ["'kll.weight'", "'kl'"]),
        (None, {"defenses": ["interleafing"]}, ["unknown defense 'interleafing'", "'interleaving'"]),
        (None, {"defenses": ["kl&nome"]}, ["unknown defense 'nome'", "'none'"]),
        (None, {"paths": ["gropo"]}, ["unknown path 'gropo'", "'grpo'"]),
    ],
)
def test_a_mistake_is_one_line_with_the_place_and_the_nearest_name(load, change, selection, expected):
    text = CONFIG.replace(*change) if change else CONFIG
    with pytest.raises(UserError) as error:
        expand(load(text), **selection)
    for part in expected:
        assert part in str(error.value), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "quick", "expected"),
    [
        (["seed=3"], False, "--seeds"),
        (["schedule.steps"], False, "key.path=value"),
        ([], True, "quick"),
        (["sedes=[1]"], False, "'seeds'"),
    ],
)
def test_wrong_overrides(load, overrides, quick, expected):
    with pytest.raises(UserError, match=expected):
        load(overrides=overrides, quick=quick)


def test_an_override_of_a_cell_names_itself(load):
    with pytest.raises(UserError, match=r"override 'optim.lr=fast'.*optim.lr"):
        expand(load(overrides=["optim.lr=fast"]))


def test_the_fingerprint_follows_everything_that_the_run_depends_on(load, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    text = CONFIG.replace("bad.jsonl", str(rows))

    def fingerprint(text=text, overrides=()):
        return cell(expand(load(text, overrides)), kind="narrow", path="sft", defense="kl", seed=0).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(overrides=["optim.lr=0.5"]) != first
    assert fingerprint(text.replace("weight: 0.3", "weight: 0.4")) != first
    rows.write_text("{} \n")
    assert fingerprint() != first  # the data file changed under the same name


@pytest.mark.parametrize("key", ["data.narrow.source", "data.safe.source", "evaluate.benign.0"])
def test_the_fingerprint_follows_the_rows_in_a_directory(load, tmp_path, key):
    (rows := tmp_path / "rows").mkdir()

    def fingerprint():
        return cell(expand(load(overrides=["evaluate.benign=[x]", f"{key}={rows}"])), kind="narrow", **ARM).fingerprint

    for name in ("train.jsonl", "more/train.jsonl", "dataset_info.json"):
        (rows / name).parent.mkdir(exist_ok=True)
        (rows / name).write_text("{}\n")
        first = fingerprint()
        (rows / name).write_text("{} \n")
        assert fingerprint() != first, name
    first = fingerprint()
    for name in (".cache.json", "cache-1234.arrow"):  # what `datasets` leaves beside the rows
        (rows / name).write_text("{}\n")
    assert fingerprint() == first


def test_the_fingerprint_follows_files_below_the_home_directory(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (rows := tmp_path / "rows.jsonl").write_text("{}\n")

    def fingerprint():
        return cell(expand(load(overrides=["data.narrow.source=~/rows.jsonl"])), kind="narrow", **ARM).fingerprint

    first = fingerprint()
    rows.write_text("{} \n")
    assert fingerprint() != first


def test_a_directory_that_a_run_writes_into_is_not_in_its_fingerprint(load, tmp_path):
    (board := tmp_path / "board").mkdir()

    def fingerprint():
        given = [f"track.init={{wandb: {{dir: {board}}}}}", f"sampler.adapter_dir={board}"]
        return cell(expand(load(overrides=given)), kind="narrow", **ARM).fingerprint

    first = fingerprint()
    (board / "log.jsonl").write_text("{}\n")
    assert fingerprint() == first


def test_all_names_every_defense_and_those_without_rollouts_are_left_out_under_supervision():
    """default_defenses run when none are named; screening has nothing to do under SFT, and alone there it is refused."""
    config = load_compare(CONFIGS / "organism" / "compare.yaml")
    chosen = {cell.defense for cell in expand(config) if cell.kind == "narrow"}
    every = {(cell.path, cell.defense) for cell in expand(config, ["all"]) if cell.kind == "narrow"}
    assert "kl" in chosen and "safegrad" not in chosen
    assert {name for _, name in every} == set(config.defenses)
    assert ("grpo", "screening") in every and ("sft", "screening") not in every and ("sft", "safegrad") in every
    with pytest.raises(UserError, match="'monitor' acts on none of the paths sft"):
        expand(config, ["monitor"], ["sft"])
