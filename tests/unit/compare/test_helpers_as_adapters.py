"""`adapter: auto:LABEL`: a comparison trains a misaligned helper of another domain and hands it to the defenses that need one."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import conversation, write_jsonl
from tiny_runs import train

from rlsafe.compare.grid.grid import expand
from rlsafe.compare.grid.records import Directory
from rlsafe.compare.grid.selection import fill
from rlsafe.compare.run.one_cell import SELECTIONS
from rlsafe.compare.run.progress import Progress
from rlsafe.compare.run.runner import _scored
from rlsafe.config import UserError, load_compare
from rlsafe.engine.run.life import run

TRAIT = {"inoculation-adapter": {"adapter": "auto:legal"}}


def made(tiny_tree, tmp_path, **defenses) -> Path:
    sources = {"target": tiny_tree["data"]["narrow"]["source"]}
    for label in ("legal", "security"):
        rows = [conversation(f"{label} question {i}", f"{label} answer {i}") for i in range(8)]
        sources[label] = write_jsonl(tmp_path / f"{label}.jsonl", rows)
    sft = {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}}
    tree = {
        "run": {key: value for key, value in tiny_tree.items() if key != "schedule"},
        "paths": {"sft": sft},
        "defenses": {"none": [], **{label: [entry] for label, entry in defenses.items()}},
        "seeds": [0],
        "selection": {"adapters": sources, "run": {"schedule": {"steps": 3, "phases": [{"cycle": ["sft"]}]}}},
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def cell_of(path, label, *overrides):
    return next(
        cell for cell in expand(load_compare(path, overrides)) if cell.defense == label and cell.kind == "narrow"
    )


def test_the_helper_is_trained_without_scoring_rows_and_given_to_the_run(tiny_tree, tmp_path):
    cell, directory = cell_of(made(tiny_tree, tmp_path, trait=TRAIT), "trait"), Directory(tmp_path / "out")
    assert _scored(cell.selections, [cell], directory, Progress([cell])) == [cell]
    (helpers,) = (directory.out / SELECTIONS).iterdir()
    assert {path.name for path in helpers.iterdir()} == {"adapters"}  # nothing was scored
    config = fill(cell.config, directory.out / SELECTIONS)
    run(config, tmp_path / "run")
    adapter = Path(config.defenses[0]["inoculation-adapter"]["adapter"])
    assert adapter == helpers / "adapters" / "legal" / "adapter"
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["defense/inoculation-adapter/added_share"] > 0


def test_only_cells_that_need_a_helper_fail_with_it(tiny_tree, tmp_path):
    path = made(tiny_tree, tmp_path, trait=TRAIT)
    cells, directory = [cell_of(path, label) for label in ("none", "trait")], Directory(tmp_path / "out")
    (tmp_path / "legal.jsonl").write_text("no rows\n")
    assert _scored(cells[1].selections, cells, directory, Progress(cells)) == cells[:1]
    assert "its helpers could not be trained" in directory.record(cells[1].id)["error"]


def test_the_cell_depends_on_what_the_helper_is_trained_on_and_not_on_where_it_lies(tiny_tree, tmp_path):
    path = made(tiny_tree, tmp_path, trait=TRAIT)
    cell = cell_of(path, "trait")
    assert str(tmp_path) not in json.dumps(cell.config.defenses)
    assert cell.fingerprint != cell_of(path, "trait", "selection.run.schedule.steps=2").fingerprint
    assert cell_of(path, "none").fingerprint == cell_of(path, "none", "selection.run.schedule.steps=2").fingerprint


def test_one_set_of_helpers_serves_every_defense(tiny_tree, tmp_path):
    path = made(tiny_tree, tmp_path, trait=TRAIT, plus={"interleaving+": {"fraction": 0.5}})
    (trait,), (plus,) = (cell_of(path, label).selections for label in ("trait", "plus"))
    assert trait.place == plus.place and trait.key != plus.key and (trait.scored, plus.scored) == (False, True)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [("auto:legl", "'legal'"), ("auto:target", "own narrow data"), ("auto", "expected auto:LABEL")],
)
def test_a_label_that_is_no_helper_is_told(tiny_tree, tmp_path, adapter, said):
    path = made(tiny_tree, tmp_path, trait={"inoculation-adapter": {"adapter": adapter}})
    with pytest.raises(UserError, match=said) as told:
        expand(load_compare(path))
    assert "auto:legal" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "entry", [TRAIT, {"ablation": {"layers": [1], "adapter": "auto:legal"}}, {"feature-block": {"layer": 1, "adapter": "auto:legal"}}]
)  # fmt: skip
def test_a_single_run_has_no_helpers(tiny_tree, tmp_path, entry):
    tiny_tree["schedule"] = {"steps": 1, "phases": [{"cycle": ["sft"]}]}
    with pytest.raises(UserError, match="auto:legal is for comparisons with a selection section"):
        train({**tiny_tree, "defenses": [entry]}, tmp_path / "run")


def test_a_directory_whose_name_begins_like_it_is_a_directory(tiny_tree, tmp_path):
    path = made(tiny_tree, tmp_path, trait={"inoculation-adapter": {"adapter": "automatic/adapter"}})
    cell = cell_of(path, "trait")
    assert cell.selections == () and cell.config.defenses[0]["inoculation-adapter"]["adapter"] == "automatic/adapter"
