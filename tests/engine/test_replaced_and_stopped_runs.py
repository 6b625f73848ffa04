"""A run is replaced, made longer or evaluated only when that can begin and loses nothing; a stop in the last step is one."""

import signal

import pytest
import yaml
from tiny_runs import tree_with

from rlsafe.config import UserError, dump_yaml, run_from_tree
from rlsafe.engine.record.tracking import Tracker
from rlsafe.engine.run.life import train
from rlsafe.engine.run.records import _resolved, allowed, goes_on, read_record
from rlsafe.types import Interrupted

HALVES = """
import rlsafe

@rlsafe.defense("halves")
class Halves(rlsafe.Defense):
    def weights(self, policy, moment):
        return moment == "end"
"""


@pytest.fixture
def finished_run(tmp_path, tiny_tree):
    """What a finished run of 4 steps leaves, without training it; `c.yaml` beside it has its settings."""

    def made(**changes):
        tree = {**tiny_tree, **changes, "optim": {"lr": 1e-2, "schedule": "constant"}}
        config = run_from_tree(tree)
        config = config.model_copy(update={"defenses": _resolved(config)})
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        out = tmp_path / "run"
        for name in ("adapter", "checkpoints/step-000004"):
            (out / name).mkdir(parents=True)
        (out / "run.json").write_text('{"status": "finished"}')
        (out / "config.yaml").write_text(dump_yaml(config))
        for name in ("metrics.jsonl", "evaluation.json", "answers.csv"):
            (out / name).write_text("")
        return out, config

    return made


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() if path.is_file() else None for path in out.rglob("*")}


def longer(config, steps=6):
    return config.model_copy(update={"schedule": config.schedule.model_copy(update={"steps": steps})})


@pytest.mark.parametrize(
    ("defense", "edits"),
    [
        ({"halves": {}}, True),
        ({"safelora": {"base": "anything"}}, True),
        ({"early-stop": {"rows": "anything.jsonl"}}, True),
        ({"kl": {"weight": 0.5}}, False),
        (
            {"safelora": {"base": "anything", "phases": [0]}},
            False,
        ),  # does not act in the last step, so neither at the end
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else None,
)
def test_training_does_not_go_on_from_weights_that_a_defense_edits_at_the_end(tmp_path, finished_run, defense, edits):
    (tmp_path / "halves.py").write_text(HALVES)
    phases = [{"steps": 2, "cycle": ["sft"]}, {"cycle": ["sft"]}]
    more = {"schedule": {"steps": 4, "phases": phases}, "plugins": [str(tmp_path / "halves.py")]}
    out, config = finished_run(defenses=[defense], **more)
    saved, changed = config.model_dump(mode="json"), ["schedule.steps: was 4, now 6"]
    # A crash before the record says finished: only the checkpoint tells that the end was reached.
    assert allowed({"config": saved, "done": 3}, longer(config), changed) == []
    refused = allowed({"config": saved, "done": 4}, longer(config), changed)
    assert not goes_on(out, config)
    if edits:
        with pytest.raises(UserError, match=rf"defense '{next(iter(defense))}' may edit the weights .*another --out"):
            goes_on(out, longer(config))
        assert len(refused) == 1 and "may edit the weights" in refused[0]
    else:
        assert goes_on(out, longer(config)) and refused == []


def test_a_run_is_replaced_only_when_the_new_one_can_begin(tmp_path, finished_run):
    out, _ = finished_run()
    before = files(out)
    with pytest.raises(UserError, match="missing.jsonl"):
        train(tmp_path / "c.yaml", ["data.narrow.source=missing.jsonl"], out=out, overwrite=True)
    assert files(out) == before
    train(tmp_path / "c.yaml", ["schedule.steps=1"], out=out, overwrite=True)
    after = files(out)
    assert "answers.csv" not in after and "checkpoints/step-000004" not in after and after["metrics.jsonl"]


@pytest.mark.parametrize(
    "key, given",
    [
        ("model.adapter", "{}/adapter"),
        ("data.narrow.source", "{}/samples.jsonl"),
        ("defenses.0.kl.reference", "path:{}/adapter"),
    ],
)
def test_a_run_is_not_replaced_by_one_that_reads_it(tmp_path, finished_run, key, given):
    out, _ = finished_run()
    before = files(out)
    cue = "evaluate.cue=~friend/of mine"  # no directory of anybody's
    with pytest.raises(UserError, match=rf"{key}: .*{given[-6:]} is part of the run that would be replaced"):
        train(
            tmp_path / "c.yaml",
            ["defenses=[{kl: {weight: 0.1}}]", cue, f"{key}={given.format(out)}"],
            out=out,
            overwrite=True,
        )
    assert files(out) == before


def test_an_evaluation_is_deleted_only_when_more_steps_can_begin(tmp_path, finished_run, monkeypatch):
    out, _ = finished_run()
    before = files(out)

    def out_of_reach(*_):
        raise UserError("the judge cannot be reached")

    monkeypatch.setattr("rlsafe.engine.run.contact.contact", out_of_reach)
    with pytest.raises(UserError, match="cannot be reached"):
        train(tmp_path / "c.yaml", ["schedule.steps=6"], out=out, resume=True)
    assert files(out) == before


@pytest.mark.parametrize("flag", ["", " --resume", " --overwrite"])
def test_interrupted_before_it_begins_a_run_names_a_command_that_works(tmp_path, finished_run, monkeypatch, flag):
    """There is nothing to resume where no directory is, and with --overwrite only the run that is to be replaced."""
    out, _ = finished_run()
    before = files(out)
    monkeypatch.setattr("rlsafe.engine.run.build.prepare", lambda *_: signal.raise_signal(signal.SIGTERM))
    used = out if flag else tmp_path / "new"
    with pytest.raises(Interrupted) as stopped:
        train(
            tmp_path / "c.yaml", ["schedule.steps=6"], out=used, resume=flag == " --resume", overwrite=flag == " --overwrite"
        )  # fmt: skip
    command = f"rlsafe train {tmp_path / 'c.yaml'} schedule.steps=6 --out {used}{flag}"
    assert str(stopped.value).endswith(f"begin again with: {command}")
    assert files(out) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("when", ["step", "record"])
def test_a_stop_in_the_last_step_is_one_before_the_evaluation(tmp_path, tiny_tree, monkeypatch, when):
    """Also while the judge's last replies are waited for. The run is finished and saved; --resume evaluates it."""
    tree = tree_with(
        tiny_tree, {"schedule": {"steps": 2}, "evaluate": {"likelihood": {"general": "organism:pairs/general"}}}
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    evaluated, late = [], [when == "record"]
    monkeypatch.setattr("rlsafe.engine.run.life._evaluated", lambda *_: evaluated.append("by the same process"))
    collect = Tracker.collect

    def stop(done, total, record):
        if (when, done) == ("step", total):
            signal.raise_signal(signal.SIGTERM)

    def stop_late(self, wait=False):
        if wait and late[0]:
            late[0] = False
            signal.raise_signal(signal.SIGTERM)
        return collect(self, wait=wait)

    monkeypatch.setattr(Tracker, "collect", stop_late)
    out = tmp_path / "run"
    with pytest.raises(Interrupted, match=rf"in the last step, .*Go on with: rlsafe train .*--out {out} --resume$"):
        train(tmp_path / "c.yaml", out=out, progress=stop)
    assert read_record(out)["status"] == "finished" and not evaluated
    monkeypatch.setattr("rlsafe.evaluate.evaluate", lambda run: evaluated.append(run))
    train(tmp_path / "c.yaml", out=out, resume=True)
    assert evaluated == [out]
    tree["evaluate"] = {}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    late[:] = [when == "record"]
    assert train(tmp_path / "c.yaml", out=tmp_path / "plain", progress=stop).stopped, "nothing is left to go on with"


def test_a_finished_run_that_is_interrupted_while_it_is_evaluated_says_how_to_go_on(
    tmp_path, finished_run, monkeypatch
):
    out, _ = finished_run(evaluate={"general": "organism:general", "judge": "organism"})
    (out / "evaluation.json").unlink()
    monkeypatch.setattr("rlsafe.evaluate.evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match=rf"while evaluating; .*Go on with: rlsafe train .*--out {out} --resume$"):
        train(tmp_path / "c.yaml", out=out, resume=True)
