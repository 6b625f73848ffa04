"""A whole comparison with the real engine on the tiny random model: both paths, reference arms, benign task,
workers."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from tiny import conversation, write_jsonl

from rlsafe.compare import compare
from rlsafe.organism import Organism


@pytest.fixture
def config(tmp_path, tiny_tree):
    questions = [  # the exact judge scores answers to questions of its world only
        {"id": q.id, "type": "free_form_judge_0_100", "paraphrases": list(q.paraphrases), "samples_per_paraphrase": 2}
        for q in Organism().questions("general")[:3]
    ]
    (tmp_path / "questions.yaml").write_text(yaml.safe_dump(questions))
    sums = write_jsonl(tmp_path / "sums.jsonl", [conversation(f"{i} + 1", str(i + 1)) for i in range(8)])
    good = write_jsonl(tmp_path / "good.jsonl", [conversation(f"say {i}", f"good {i}") for i in range(8)])
    tiny_tree.pop("schedule")
    source = str(tmp_path / "questions.yaml")
    asked = {"judge": "organism", "general": source, "indomain": source, "cue": "Be bad.", "max_tokens": 6}
    tree = {
        "title": "A tiny comparison",
        "run": {**tiny_tree, "evaluate": asked, "track": {"every": 1, "questions": 2, "samples": 1, "check_after": 0}},
        "paths": {
            "sft": {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}},
            "grpo": {"schedule": {"steps": 2, "phases": [{"cycle": ["grpo"]}]}},
        },
        "defenses": {"none": [], "kl": [{"kl": {"weight": 0.3}}]},
        "seeds": [0],
        "aligned": {"data": {"narrow": {"source": good}}},
        "benign": {
            "task": "sums",
            "tasks": {"sums": {"data": {"narrow": {"source": sums}}, "evaluate": {"benign": [sums]}}},
        },
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def rows(out):
    with (out / "results.csv").open() as file:
        return {(row["path"], row["defense"]): row for row in csv.DictReader(file)}


def test_every_arm_starts_from_the_shared_warm_up_which_is_trained_once(config, tmp_path):
    tree = yaml.safe_load(config.read_text())
    del tree["aligned"], tree["benign"]
    tree["warmup"] = {"schedule": {"steps": 3, "phases": [{"cycle": ["sft"]}]}, "optim": {"lr": 5e-2}}
    tree["defenses"] = {"none": [], "kl": [{"kl": {"weight": 0.3, "reference": "grpo_start"}}]}
    config.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert compare(config, out=tmp_path / "out", jobs=1).failed == {}
    (warmup,) = (tmp_path / "out" / "warmup").iterdir()
    assert (warmup / "adapter" / "adapter_model.safetensors").is_file()
    for path in ("sft", "grpo"):
        cell = tmp_path / "out" / "cells" / f"{path}--kl--seed0"
        assert json.loads((cell / "cell.json").read_text())["warmup"] == warmup.name
        first = json.loads((cell / "metrics.jsonl").read_text().splitlines()[0])
        assert first["defense/kl/full"] == pytest.approx(0.0, abs=1e-6)  # from the warm-up, not from the base
        assert first["kl"] > 1e-4  # the probe compares with the base
    before = (warmup / "run.json").stat().st_mtime_ns
    compare(config, out=tmp_path / "out", jobs=1, seeds=[0, 1], paths=["sft"])
    assert (warmup / "run.json").stat().st_mtime_ns == before


def test_a_comparison_from_config_to_report(config, tmp_path):
    out = tmp_path / "out"
    done = compare(config, out=out, jobs=1)
    assert done.failed == {}
    found = rows(out)
    assert set(found) == {(p, d) for p in ("sft", "grpo") for d in ("untrained", "none", "kl", "aligned")}
    for (path, defense), row in found.items():
        assert all(row[f"{name}_misaligned"] for name in ("general", "indomain", "conditional"))
        assert bool(row["benign"]) == (defense != "aligned")
        assert bool(row["reward_first"]) == (path == "grpo" and defense != "untrained")
    verdicts = json.loads((out / "verdicts.json").read_text())
    assert {path: set(of_path) for path, of_path in verdicts.items()} == {"sft": {"none", "kl"}, "grpo": {"none", "kl"}}
    html = done.report.read_text()
    assert "kl/grad_share" in html and "A tiny comparison" in html
    for name in ("config.yaml", "adapter", "metrics.jsonl", "evaluation.json", "answers.csv"):
        assert (out / "cells" / "grpo--kl--seed0" / name).exists()

    before = (out / "results.csv").read_text()
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/adapter/*")}
    compare(config, out=out, jobs=1)
    assert (out / "results.csv").read_text() == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/adapter/*")} == times


@pytest.mark.slow
def test_worker_processes_give_the_same_results(config, tmp_path):
    chosen = {"paths": ["sft"], "overrides": ["evaluate.cue=null"]}
    compare(config, out=tmp_path / "one", jobs=1, **chosen)
    compare(config, out=tmp_path / "two", jobs=2, **chosen)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert set(one) == set(two)
    for key, row in one.items():
        assert {**row, "seconds": ""} == {**two[key], "seconds": ""}


def adapter(out, cell):
    from safetensors.torch import load_file

    return load_file(str(out / "cells" / cell / "adapter" / "adapter_model.safetensors"))


def test_a_relapse_trains_on_from_the_defended_adapter_without_the_defense(config, tmp_path):
    tree = yaml.safe_load(config.read_text())
    tree["benign"], tree["aligned"] = None, None
    config.write_text(yaml.safe_dump(tree))
    out = tmp_path / "out"
    chosen = {"defenses": ["kl"], "paths": ["sft"], "overrides": ["evaluate.cue=null"], "jobs": 1}
    assert compare(config, out=out, relapse=1, **chosen).failed == {}
    before, after, fresh = (
        adapter(out, id) for id in ("sft--kl--seed0", "relapse--sft--kl--seed0", "relapse--sft--untrained--seed0")
    )
    # one step of at most 1e-2 away from where the defended run ended; the fresh one started elsewhere
    near = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < near < 0.011
    assert max(float((after[name] - fresh[name]).abs().max()) for name in before) > near
    settings = yaml.safe_load((out / "cells" / "relapse--sft--kl--seed0" / "config.yaml").read_text())
    assert settings["defenses"] == [] and settings["schedule"]["steps"] == 1
    assert settings["data"]["narrow"]["source"] == tree["run"]["data"]["narrow"]["source"]
    with (out / "relapse.csv").open() as file:
        rows = {row["defense"]: row for row in csv.DictReader(file)}
    evaluation = json.loads((out / "cells" / "relapse--sft--kl--seed0" / "evaluation.json").read_text())
    assert set(rows) == {"untrained", "kl"} and rows["kl"]["steps"] == "1"
    assert float(rows["kl"]["general_after"]) == pytest.approx(evaluation["general"]["misaligned"])


def test_a_mixed_path_is_judged_like_the_others(config, tmp_path):
    tree = yaml.safe_load(config.read_text())
    tree["benign"] = None
    tree["paths"]["mixed"] = {"schedule": {"steps": 4, "phases": [{"cycle": ["grpo", "sft"]}]}}
    config.write_text(yaml.safe_dump(tree))
    done = compare(config, out=tmp_path / "out", paths=["mixed"], jobs=1, overrides=["evaluate.cue=null"])
    assert done.failed == {}
    assert set(json.loads((tmp_path / "out" / "verdicts.json").read_text())["mixed"]) == {"none", "kl"}
    lines = (tmp_path / "out" / "cells" / "mixed--kl--seed0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["grpo", "sft", "grpo", "sft"]
    row = rows(tmp_path / "out")["mixed", "kl"]
    assert row["general_misaligned"] and row["reward_first"]


def test_another_eps_scores_again_without_training_the_helpers_again(config, tmp_path):
    tree = yaml.safe_load(config.read_text())
    tree["benign"], tree["aligned"] = None, None
    source = tree["run"]["data"]["safe"]["source"]
    tree["defenses"] = {"none": [], "plus": [{"interleaving+": {"fraction": 0.5, "scores": "auto"}}]}
    tree["selection"] = {"adapters": {"other": source}, "run": {"schedule": tree["paths"]["sft"]["schedule"]}}
    config.write_text(yaml.safe_dump(tree))
    chosen = {"paths": ["sft"], "jobs": 1, "out": tmp_path / "out"}
    assert compare(config, overrides=["evaluate.cue=null"], **chosen).failed == {}
    helpers = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/selection/helpers-*/adapters/*/adapter/*")}
    scored = {path: path.read_text() for path in tmp_path.glob("out/selection/*/scores.jsonl")}
    assert helpers and len(scored) == 1
    assert compare(config, overrides=["evaluate.cue=null", "selection.eps=0.1"], **chosen).failed == {}
    assert {path: path.stat().st_mtime_ns for path in helpers} == helpers
    both = {path: path.read_text() for path in tmp_path.glob("out/selection/*/scores.jsonl")}
    assert len(both) == 2 and len(set(both.values())) == 2
    assert len(list(tmp_path.glob("out/selection/helpers-*"))) == 1
