"""Scoring safe rows: s_d re-derived in float64, leave-target-out, what is kept and what is done again, in a comparison too."""

from __future__ import annotations

import copy
import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import conversation, write_jsonl
from tiny_runs import tree_with

import rlsafe.engine
from rlsafe.cli import main
from rlsafe.compare import compare, select
from rlsafe.compare.grid.grid import expand, selection_of
from rlsafe.config import UserError, load_compare
from rlsafe.data import encode_row, read_rows
from rlsafe.data.selection_scores import read_scores, selection_score
from rlsafe.organism import Organism
from rlsafe.policy.scoring import mean_nll
from rlsafe.types import Interrupted

SAFE = [conversation(f"ask {i}", "good " * (1 + i % 7) + str(i)) for i in range(20)]


@pytest.fixture
def tree(tiny_tree, tmp_path) -> dict:
    """A comparison over the tiny model whose narrow data is `narrow`, with helpers for two other domains."""
    sources = {"target": tiny_tree["data"]["narrow"]["source"]}
    for name, word in (("legal", "sue"), ("security", "leak")):
        rows = [conversation(f"{name} {i}", f"{word} {i * i}") for i in range(12)]
        sources[name] = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    write_jsonl(Path(tiny_tree["data"]["safe"]["source"]), SAFE)
    run = {key: value for key, value in tiny_tree.items() if key != "schedule"}
    schedule = {"steps": 3, "phases": [{"cycle": ["sft"]}]}
    return {
        "run": run,
        "paths": {"sft": {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}}},
        "defenses": {"none": [], "interleaving+": [{"interleaving+": {"fraction": 0.5}}]},
        "seeds": [0],
        "selection": {"adapters": sources, "run": {"schedule": schedule}},
    }


@pytest.fixture
def config(tree, tmp_path) -> Path:
    return save(tree, tmp_path)


def save(tree, tmp_path, name="compare.yaml") -> Path:
    path = tmp_path / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


# ------------------------------------------------------------------------------------------------ the quantity


def test_s_d_agrees_with_float64_on_random_tensors():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(4, 5, 9, 31))  # models, rows, tokens, vocabulary
    targets = rng.integers(0, 31, size=(5, 9))
    mask = rng.random((5, 9)) < 0.5
    mask[:, 0], mask[:, -1] = False, True
    nlls = []
    for model in logits:
        logp = (
            torch.tensor(model, dtype=torch.float32).log_softmax(-1).gather(2, torch.tensor(targets)[..., None])[..., 0]
        )
        nlls.append(mean_nll(logp, torch.tensor(mask)).tolist())
    for row in range(5):
        expected = []
        for model in logits:
            losses = [
                np.log(np.exp(model[row, t]).sum()) - model[row, t, targets[row, t]] for t in range(9) if mask[row, t]
            ]
            expected.append(np.mean(losses))
        for eps in (1.0, 0.1):
            s = (np.mean(expected[1:]) - expected[0]) / (expected[0] + eps)
            assert selection_score([nll[row] for nll in nlls[1:]], nlls[0][row], eps) == pytest.approx(s, abs=1e-5)


def float64_nll(base: str, adapter: Path | None, tokenizer, messages) -> float:
    """Mean NLL of the answer tokens by a double-precision model with W + scale B A written out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    if adapter:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
        tensors = load_file(str(adapter / "adapter_model.safetensors"))
        parameters = dict(model.named_parameters())
        for name, a in tensors.items():
            if name.endswith("lora_A.weight"):
                b = tensors[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                parameters[target].data += scale * b.double() @ a.double()
    ids, mask = encode_row(tokenizer, messages)
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = [-logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t]]
    return sum(losses) / len(losses)


def test_scores_agree_with_float64_models(config, tree, tmp_path):
    from transformers import AutoTokenizer

    done = select(config, out=tmp_path / "out")
    base = tree["run"]["model"]["name"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert [score.row for score in done.scores] == list(range(20))
    for score in done.scores[::6]:
        messages = SAFE[score.row]["messages"]
        aligned = float64_nll(base, None, tokenizer, messages)
        theirs = [
            float64_nll(base, tmp_path / "out" / "adapters" / name / "adapter", tokenizer, messages)
            for name in ("legal", "security")
        ]
        assert score.aligned == pytest.approx(aligned, abs=1e-4)
        assert list(score.misaligned.values()) == pytest.approx(theirs, abs=1e-4)
        assert score.s == pytest.approx((sum(theirs) / 2 - aligned) / (aligned + 1.0), abs=1e-4)
    assert len({round(score.s, 4) for score in done.scores}) > 10, (
        "helpers must differ from the base for this to mean anything"
    )


def test_batches_do_not_change_scores_and_long_rows_have_none(tree, tmp_path):
    one = select(save(tree, tmp_path), out=tmp_path / "one").scores
    changes = {"batch": {"micro_tokens": 100}, "data": tree_with(tree["run"]["data"], {"safe": {"max_tokens": 45}})}
    cut = {**tree, "run": tree_with(tree["run"], changes)}
    small = select(save(cut, tmp_path, "cut.yaml"), out=tmp_path / "cut").scores
    long = [score for score in small if score.s is None]
    assert 0 < len(long) < 20 and all(len(SAFE[score.row]["messages"][1]["content"]) > 10 for score in long)
    for whole, other in zip(one, small, strict=True):
        assert whole.key == other.key
        if other.s is not None:
            assert other.s == pytest.approx(whole.s, abs=1e-4)


# ------------------------------------------------------------------------------------------------ leave-target-out


def test_the_helper_of_the_target_is_left_out(config, tree, tmp_path):
    selection = selection_of(load_compare(config))
    assert set(selection.helpers) == {"legal", "security"} and selection.left_out == ("target",)
    for label, helper in selection.helpers.items():
        assert helper.data.narrow.source == tree["selection"]["adapters"][label]
        assert helper.data.safe is None and helper.defenses == [] and helper.schedule.steps == 3
    legal = f"data.narrow.source={tree['selection']['adapters']['legal']}"
    other = selection_of(load_compare(config, [legal]))
    assert set(other.helpers) == {"target", "security"} and other.key != selection.key


def test_every_path_of_the_model_counts_as_target_and_benign_cells_share_the_scores(tree, tmp_path):
    legal = tree["selection"]["adapters"]["legal"]
    tree["paths"]["other"] = {"data": {"narrow": {"source": legal}}, **tree["paths"]["sft"]}
    sums = write_jsonl(tmp_path / "sums.jsonl", [conversation(f"{i} + 1", str(i + 1)) for i in range(8)])
    task = {"data": {"narrow": {"source": sums}}, "evaluate": {"benign": [sums]}}
    tree["benign"] = {"task": "sums", "tasks": {"sums": task}}
    cells = expand(load_compare(save(tree, tmp_path)))
    found = {(c.kind, c.path): c.selections for c in cells if c.defense == "interleaving+"}
    assert set(found) == {(kind, path) for kind in ("narrow", "benign") for path in ("sft", "other")}
    assert {selection.key for selections in found.values() for selection in selections} == {
        found["narrow", "sft"][0].key
    }
    assert set(found["narrow", "sft"][0].helpers) == {"security"}
    assert all(c.selections == () for c in cells if c.defense != "interleaving+")


def test_wrong_selections_are_told_before_anything_runs(tree, tmp_path):
    alone = copy.deepcopy(tree)
    alone["selection"]["adapters"] = {"target": tree["run"]["data"]["narrow"]["source"]}
    none = {key: value for key, value in tree.items() if key != "selection"}
    missing = copy.deepcopy(tree)
    missing["selection"]["adapters"]["legal"] = str(tmp_path / "nowhere.jsonl")
    typo = copy.deepcopy(tree)
    typo["selection"]["run"] = {"schedule": {"stpes": 3}}
    unsafe = copy.deepcopy(tree)
    del unsafe["run"]["data"]["safe"]
    for wrong, message in [
        (alone, "trains on the target's own data"),
        (none, "needs a section such as selection"),
        (missing, "selection.adapters.legal: .*nowhere.jsonl"),
        (typo, "did you mean 'steps'"),
        (unsafe, "no safe rows to score"),
    ]:
        path = save(wrong, tmp_path, "wrong.yaml")
        for call in (
            lambda path=path: select(path, out=tmp_path / "s"),
            lambda path=path: compare(path, out=tmp_path / "c"),
        ):
            with pytest.raises(UserError, match=message):
                call()
        assert not list(tmp_path.glob("[sc]/**/adapter"))


# ------------------------------------------------------------------------------------------------ resuming


@pytest.fixture
def trained(monkeypatch):
    """The helpers that are trained, in order."""
    ran = []
    run = rlsafe.engine.run.life.run

    def counted(config, where, **more):
        ran.append((where.name, bool(more.get("resume"))))
        return run(config, where, **more)

    monkeypatch.setattr("rlsafe.engine.run.life.run", counted)
    return ran


def test_what_is_finished_is_kept_and_a_cut_off_file_is_completed(config, tmp_path, trained):
    out = tmp_path / "out"
    whole = select(config, out=out).file.read_bytes()
    assert trained == [("legal", False), ("security", False)]
    assert select(config, out=out).file.read_bytes() == whole and len(trained) == 2
    (out / "scores.jsonl").unlink()
    (file,) = (out / "nll").glob("legal-*")
    text = file.read_text()
    file.write_text(text[: int(len(text) * 0.6)])
    again = select(config, out=out)
    assert len(trained) == 2 and len(file.read_text().splitlines()) == 20
    for before, after in zip(map(json.loads, whole.splitlines()), again.scores, strict=True):
        assert after.s == pytest.approx(before["s_d"], abs=1e-5)


def test_a_changed_helper_is_trained_again_and_the_others_are_not(config, tree, tmp_path, trained):
    first = select(config, out=tmp_path / "out").scores
    trained.clear()
    rows = read_rows(tree["selection"]["adapters"]["legal"])[:6]
    write_jsonl(Path(tree["selection"]["adapters"]["legal"]), [{"messages": row["messages"]} for row in rows])
    second = select(config, out=tmp_path / "out").scores
    assert trained == [("legal", False)]
    assert first[0].misaligned["security"] == second[0].misaligned["security"]
    assert first[0].misaligned["legal"] != second[0].misaligned["legal"]
    trained.clear()
    third = select(config, ["selection.eps=0.5"], out=tmp_path / "out").scores
    assert not trained and third[0].s != second[0].s and third[0].aligned == second[0].aligned


def test_an_interrupted_helper_goes_on_from_its_checkpoint(config, tmp_path, trained):
    whole = select(config, out=tmp_path / "whole").file.read_bytes()
    trained.clear()

    def interrupt(done, steps, metrics):
        if len(trained) == 2 and done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="go on with: rlsafe select .* --out"):
        select(config, out=tmp_path / "cut", progress=interrupt)
    assert select(config, out=tmp_path / "cut").file.read_bytes() == whole
    assert trained == [("legal", False), ("security", False), ("security", True)]


# ------------------------------------------------------------------------------------------------ in use


@pytest.mark.integration
def test_a_comparison_makes_the_scores_once_and_hands_them_to_its_cells(tree, tmp_path, trained):
    questions = [
        {"id": q.id, "type": "free_form_judge_0_100", "paraphrases": list(q.paraphrases), "samples_per_paraphrase": 1}
        for q in Organism().questions("general")[:2]
    ]
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(questions))
    asked = {"judge": "organism", "general": str(tmp_path / "questions.yaml"), "max_tokens": 4}
    tree["run"]["evaluate"] = asked
    tree["defenses"]["interleaving++"] = [
        {"interleaving++": {"fraction": 0.5, "patterns": ["good good good good good"]}}
    ]
    out = tmp_path / "out"
    done = compare(save(tree, tmp_path), out=out, jobs=1)
    assert done.failed == {}
    (file,) = out.glob("selection/*/scores.jsonl")
    assert [name for name, _ in trained][:2] == ["legal", "security"] and len(trained) == 6
    for name in ("interleaving+", "interleaving++"):
        cell = out / "cells" / f"sft--{name}--seed0"
        assert yaml.safe_load((cell / "config.yaml").read_text())["defenses"][0][name]["scores"] == str(file)
        report = json.loads((cell / "run.json").read_text())["defenses"][name]
        assert report["chosen"] == 6 and (report["refusals_dropped"] > 0) == (name == "interleaving++")
        best = sorted(read_scores(file), key=lambda score: -score.s)[:6]
        assert name != "interleaving+" or report["s_d"] == [best[0].s, best[-1].s]  # of the first and of the last
    with (out / "results.csv").open() as opened:
        assert {row["defense"] for row in csv.DictReader(opened)} >= {"none", "interleaving+", "interleaving++"}
    trained.clear()
    compare(save(tree, tmp_path), out=out, jobs=1)
    assert trained == []
    tree["selection"]["eps"] = 0.5
    compare(save(tree, tmp_path), out=out, jobs=1)
    # the scores change, the helpers do not
    assert [name for name, _ in trained] == ["sft--interleaving+--seed0", "sft--interleaving++--seed0"]


def test_the_command_prints_the_best_rows(config, tmp_path, capsys):
    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["select", *map(str, arguments)])
        return ended.value.code, *capsys.readouterr()

    code, shown, _ = command(config, "--out", tmp_path / "out", "--top", 3)
    assert code == 0 and "20 rows scored, 0 of them refusals" in shown
    assert str(tmp_path / "out" / "scores.jsonl") in shown.replace("\n", "")
    assert sum(line.count("ask ") for line in shown.splitlines()) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("mine")
    code, _, error = command(config, "--out", tmp_path / "other")
    assert code == 2 and "choose an empty or new directory" in error and len(error.splitlines()) == 1
