"""A run directory has one owner; what a crash left in it is named; a finished run goes on with more steps, or says what differs."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from rlsafe.cli import _at_home
from rlsafe.compare.run import deciding, scoring
from rlsafe.config import UserError, run_from_tree
from rlsafe.config.files import read_lines
from rlsafe.config.lock import hold, lock_file, releasing
from rlsafe.engine.record.publish import publish
from rlsafe.engine.record.tracking import Tracker
from rlsafe.engine.run.life import _existing, train
from rlsafe.engine.run.records import allowed, differs, goes_on, over, read_record, went_on_from
from rlsafe.evaluate import evaluate
from rlsafe.evaluate.commands import rejudging

OTHER = """
import sys
from rlsafe.config.lock import hold
hold(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that owns a directory."""
    words, pipe = [sys.executable, "-c", OTHER, str(tmp_path / "run")], subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_owner_is_refused_and_a_dead_ones_lock_is_free(tmp_path, other):
    mine = releasing(lambda: hold(tmp_path / "run"))
    with pytest.raises(
        UserError, match=rf"--out {tmp_path}/run: process {other.pid} on \S+ \(since .*\) is writing there"
    ):
        mine()
    other.kill()
    other.wait()
    mine()
    assert not lock_file(tmp_path / "run").exists(), "given up at the end"


def test_a_training_command_is_refused_before_it_touches_anything(tmp_path, other, tiny_tree):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_tree))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=f"process {other.pid} on "):
        train(tmp_path / "c.yaml", out=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


def test_whoever_writes_a_directory_is_refused_before_it_loads_anything(tmp_path, other, tiny_tree, monkeypatch):
    """Evaluation, judging again, the scoring of safe rows, publishing and a comparison that adds seeds, like training."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "answers.csv").write_text("question_id\n")
    (tmp_path / "questions.yaml").write_text("- {id: a, paraphrases: ['why?']}\n")
    monkeypatch.setattr(rejudging, "load_saved", lambda *_: (None, None))
    monkeypatch.setattr(scoring, "load_compare", lambda *_: None)
    monkeypatch.setattr(scoring, "selection_of", lambda _: None)
    monkeypatch.setattr(deciding, "load_compare", lambda *_: SimpleNamespace(seeds=[], run={}))
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "config.yaml").write_text(yaml.safe_dump(tiny_tree))
    (finished / "run.json").write_text('{"status": "finished"}')
    questions, out = [str(tmp_path / "questions.yaml")], tmp_path / "run"
    for refused in (
        lambda: evaluate(tiny_tree["model"]["name"], questions, judge="organism", out=out),
        lambda: rejudging.rejudge(out, out=out),
        lambda: scoring.select("any.yaml", out=out),
        lambda: deciding.compare_decided("any.yaml", out=out),
        lambda: publish(finished, out=out),
    ):
        with pytest.raises(UserError, match=f"--out {out}: process {other.pid} on "):
            refused()
    assert [file.name for file in out.iterdir()] == ["answers.csv"]


def test_the_other_ranks_of_a_run_hold_nothing(tmp_path, other, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    hold(tmp_path / "run")


def test_the_other_ranks_of_a_run_leave_the_directory_to_the_first(tmp_path, monkeypatch, tiny_tree):
    """They may come while the first makes it ready: a file without a record is no reason to stop, and not theirs to remove."""
    config, begun = run_from_tree(tiny_tree), tmp_path / "metrics.jsonl"
    begun.touch()
    with pytest.raises(UserError, match="not empty and not a run of rlsafe"):
        _existing(tmp_path, config, resume=False, overwrite=False)
    monkeypatch.setenv("RANK", "1")
    for resume, overwrite in ((False, False), (False, True), (True, False)):
        assert _existing(tmp_path, config, resume=resume, overwrite=overwrite)[0] is None and begun.is_file()


@pytest.mark.parametrize("text", ["", '{"status": "run', "[]", "\0\0\0\0"])
def test_a_damaged_record_is_named_with_the_way_out(tmp_path, text, caplog):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=rf"{tmp_path}/run.json: .*; start over with --overwrite"):
        read_record(tmp_path, resume=True)
    assert read_record(tmp_path, overwrite=True) == {"status": "running"}
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    caplog.clear()
    assert read_record(tmp_path, resume=True) == {"status": "running"}
    assert went_on_from(tmp_path) == [] and caplog.text.count("it is written again, going on from step-000002") == 1
    with pytest.raises(UserError, match="go on from step-000002 with --resume, or start over with --overwrite"):
        read_record(tmp_path)
    assert read_record(tmp_path / "checkpoints") == {}


def test_lines_that_were_cut_off_and_settings_that_are_gone_are_named(tmp_path, tiny_tree, caplog):
    for end in ('{"step": 1, "lo', "\0\0\0\0", '{"step": 1, "é'.encode()[:-1]):
        lines = b'{"step": 0}\n\n' + (end if isinstance(end, bytes) else end.encode())
        (tmp_path / "metrics.jsonl").write_bytes(lines)
        caplog.clear()
        assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 0}]
        assert f"{tmp_path}/metrics.jsonl:3: its end was lost, as after a crash" in caplog.text
        (tmp_path / "metrics.jsonl").write_bytes(lines + b'\n{"step": 2}\n')
        with pytest.raises(UserError, match=rf"{tmp_path}/metrics.jsonl:3: not valid JSON, and whole lines follow"):
            read_lines(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "text": "a\u2028b"}\n')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 0, "text": "a\u2028b"}]
    assert read_lines(tmp_path / "none.jsonl") == []
    with pytest.raises(UserError, match=r"config.yaml: no such config file; .*start over with --overwrite"):
        goes_on(tmp_path, run_from_tree(tiny_tree))


def test_lines_that_were_lost_in_a_crash_leave_a_file_that_can_be_read(tmp_path, caplog):
    """A file that is shorter than its checkpoint says is not made longer, and what is left of a line goes."""
    whole = b'{"step": 0, "path": "sft"}\n{"step": 1, "path": "sft"}\n'
    for left in (whole[:-9], whole[:27], whole[:30] + b"\0" * 25, b"", whole):
        out = tmp_path / str(len(left))
        out.mkdir(exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            (out / name).write_bytes(left + b'{"step": 2}\n' * (left == whole))
        caplog.clear()
        tracker = Tracker(out, board=False, offset={name: len(whole) for name in ("metrics.jsonl", "samples.jsonl")})
        kept = [0, 1] if left == whole else [0] if left else []
        assert [line["step"] for line in tracker.metrics] == kept
        assert caplog.text.count("its end was lost") == 2 * (left != whole)
        for step in (2, 3):
            tracker.step({"step": step, "path": "sft"})
            tracker.samples([{"step": step}])
        tracker.close()
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert [json.loads(line)["step"] for line in open(out / name)] == [*kept, 2, 3], (name, left)


def test_a_home_directory_is_found_where_the_shell_left_its_sign(monkeypatch, tiny_tree):
    monkeypatch.setenv("HOME", "/home/me")
    assert [_at_home(one) for one in ("--out=~/a b", "~/a", "--out=a~/b", "x=~/a", "~me/a")] == [
        "--out=/home/me/a b", "/home/me/a", "--out=a~/b", "x=~/a", "~me/a",
    ]  # fmt: skip
    tiny_tree["model"] = {"name": "~/m", "adapter": "~/a", "chat_template": "~/t.jinja"}
    model = run_from_tree(tiny_tree).model
    assert [model.name, model.adapter, model.chat_template] == ["/home/me/m", "/home/me/a", "/home/me/t.jinja"]


def test_what_a_longer_run_may_change(tiny_tree):
    def config(steps, **optim):
        tiny_tree["schedule"]["steps"], tiny_tree["optim"] = steps, {"lr": 1e-2, **optim}
        return run_from_tree(tiny_tree)

    constant = {"schedule": "constant"}
    assert differs(config(4, **constant), config(6, **constant)) is None
    assert "another learning rate" in differs(config(4), config(6))
    assert "only grow" in differs(config(6, **constant), config(4, **constant))
    tiny_tree["grpo"]["max_staleness"] = 1  # step 4 would begin with older weights in the longer run
    tiny_tree["schedule"]["phases"] = [{"steps": 4, "cycle": ["sft"]}, {"cycle": ["grpo"]}]
    four, six = config(4, **constant), config(6, **constant)
    ended, earlier = ({"config": four.model_dump(mode="json"), "done": done} for done in (4, 3))
    what = ["schedule.steps: was 4, now 6"]
    assert "rollouts of step 4 are begun while step 3 updates" in allowed(ended, six, what)[0]
    assert allowed(earlier, six, what) == []
    tiny_tree["schedule"]["phases"] = [{"cycle": ["sft"]}]
    assert over(config(4, **constant), config(6, **constant)) is None, "nothing is sampled"
    assert "only schedule.steps" in differs(config(4, **constant), config(6, lr=1e-3, **constant))


def test_a_finished_run_goes_on_with_more_steps_to_the_bits_of_the_longer_run(tmp_path, tiny_tree):
    tiny_tree["optim"]["schedule"] = "constant"
    tiny_tree["checkpoint"] = {"every": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_tree))
    train(tmp_path / "c.yaml", ["schedule.steps=1"], out=tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("")  # and a crash in between
    train(tmp_path / "c.yaml", ["schedule.steps=2"], out=tmp_path / "run", resume=True)
    with pytest.raises(
        UserError, match=r"is finished and cannot go on .*optim.lr: was 0.01, now 0.001.*model.adapter="
    ):
        train(tmp_path / "c.yaml", ["schedule.steps=3", "optim.lr=1e-3"], out=tmp_path / "run", resume=True)
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    train(tmp_path / "c.yaml", ["schedule.steps=3"], out=tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "evaluation.json").exists(), "it was of the model after two steps"
    assert train(tmp_path / "c.yaml", ["schedule.steps=3"], out=tmp_path / "run", resume=True).notes == [
        "already finished; nothing to do"
    ]
    train(tmp_path / "c.yaml", ["schedule.steps=3"], out=tmp_path / "whole")
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole"))
    assert one == other
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 3 and os.getpid()
