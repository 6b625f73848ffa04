"""A judge behind an endpoint works while training goes on; an outage costs scores or time, never a wrong number."""

import json
import threading
import time

import pytest
import yaml
from scripted_server import ScriptedServer, error, ok

from rlsafe.engine.record.tracking import Late, Tracker
from rlsafe.engine.run.life import train
from rlsafe.evaluate import Evaluation
from rlsafe.types import RunError


@pytest.fixture
def run_tree(tiny_tree, tmp_path):
    questions = tmp_path / "general.yaml"
    questions.write_text(yaml.safe_dump([{"id": i, "paraphrases": [f"What is {i}?"]} for i in range(2)]))

    def make(server, steps=4, **judge):
        endpoint = {"kind": "openai", "model": "judge", "base_url": server.base_url, "cache": None, "backoff": 0.01}
        evaluate = {"general": str(questions), "judge": {**endpoint, **judge}, "max_tokens": 4, "samples": 2}
        track = {"every": 2, "samples": 1, "check_after": 0}
        return {**tiny_tree, "schedule": {"steps": steps}, "evaluate": evaluate, "track": track}

    return make


def write(tree, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_go_on_while_the_judge_works_and_its_numbers_stand_in_the_step_they_belong_to(run_tree, tmp_path):
    release, stepped = threading.Event(), []

    def script(n, body):
        if n:  # the first question of all is whether anybody is there
            release.wait(300)
        return ok("80", top={"80": 0.0})

    def progress(done, total, metrics):
        stepped.append((done, "coherence" in metrics))
        if done == 4:
            release.set()  # every step was done before the judge said a word

    with ScriptedServer(script) as server:
        run = train(write(run_tree(server), tmp_path), out=tmp_path / "run", progress=progress)
    assert stepped == [(1, False), (2, False), (3, False), (4, False)]
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3] and records == run.records
    assert [record.get("coherence") for record in records] == pytest.approx([80, None, 80, 80])
    assert [record.get("misaligned_general") for record in records] == [0, None, 0, 0] and records[0]["kl"] is not None
    probed = [s for s in lines(tmp_path / "run" / "samples.jsonl") if s.get("probe")]
    assert [(s["step"], s["outcome"]) for s in probed] == [(step, "scored") for step in (0, 0, 2, 2, 3, 3)]
    assert run.evaluation.general.n == 4 and run.evaluation.settings["judge_usage"]["failed"] == 0


def test_an_outage_leaves_scores_out_and_training_ends(run_tree, tmp_path, caplog):
    with ScriptedServer(lambda n, body: error(500)) as server:
        tree = run_tree(server, max_retries=0, protocol="number")
        run = train(write(tree, tmp_path), out=tmp_path / "run")
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record.get("unscored") for record in records] == [2, None, 2, 2]
    assert not any(name in record for record in records for name in ("coherence", "misaligned_general"))
    general = Evaluation.load(tmp_path / "run").general
    assert (general.n, general.unscored, general.misaligned, general.misaligned_bounds) == (0, 4, None, (0, 1))
    assert "unscored" in caplog.text and run.evaluation.settings["judge_usage"]["failures"] == {
        "server": 20
    }  # of the probes, too


def test_a_pause_that_is_too_long_saves_the_state_and_stops_and_the_run_can_go_on(run_tree, tmp_path):
    down = [True]

    def script(n, body):
        return error(503) if down[0] else ok("80", top={"80": 0.0})

    with ScriptedServer(script) as server:
        tree = run_tree(server, 12, on_outage="pause", retry_every=0.2, pause_deadline=0.5, max_retries=0)
        config = write(tree, tmp_path)
        with pytest.raises(
            RunError, match=r"judge 'judge' gave no reply .*state saved\. Resume with: rlsafe train .*--resume"
        ):
            # steps of this size would be over before the judge's first word
            train(config, out=tmp_path / "run", progress=lambda *_: time.sleep(0.25))
        stopped = len(lines(tmp_path / "run" / "metrics.jsonl"))
        assert 1 <= stopped < 12
        down[0] = False
        run = train(config, out=tmp_path / "run", resume=True)
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(12)) and run.evaluation.general.unscored == 0
    assert records[-1]["coherence"] == pytest.approx(80) and "coherence" not in records[0]


def test_lines_keep_their_order_whenever_their_numbers_come(tmp_path):
    arrived = threading.Event()
    tracker = Tracker(tmp_path)
    tracker.step(
        {"step": 0, "path": "sft", "loss": 1.0}, Late(arrived.is_set, lambda: arrived.wait(60) and {"late": 7})
    )
    tracker.step({"step": 1, "path": "sft", "loss": 2.0})
    tracker.samples([{"step": 1}])
    assert lines(tmp_path / "metrics.jsonl") == lines(tmp_path / "samples.jsonl") == []
    threading.Timer(0.2, arrived.set).start()
    offset = tracker.offset()  # a checkpoint holds whole steps
    assert arrived.is_set()
    assert [r.get("late") for r in lines(tmp_path / "metrics.jsonl")] == [7, None] and offset["samples.jsonl"] > 0
    tracker.close()


def test_several_judgements_that_fail_cost_no_line(tmp_path):
    tracker = Tracker(tmp_path)
    ready = threading.Event()

    def refused():
        raise ValueError("a score of 300")

    for step in range(3):
        tracker.step({"step": step, "path": "sft", "loss": 1.0}, Late(ready.is_set, refused))
    ready.set()
    tracker.collect_at_once()
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    tracker.close()


def test_what_cannot_wait_for_the_judge_is_written_without_its_numbers(tmp_path, caplog):
    """Nor is a step's own line lost when the wait for them is broken off."""
    tracker = Tracker(tmp_path)

    def broken_off():
        raise KeyboardInterrupt

    for step in range(2):
        tracker.step({"step": step, "path": "sft", "loss": 1.0}, Late(lambda: False, broken_off))
    tracker.step({"step": 2, "path": "sft", "loss": 1.0}, Late(lambda: True, lambda: {"late": 7}))
    with pytest.raises(KeyboardInterrupt):
        tracker.offset()
    assert not lines(tmp_path / "metrics.jsonl")
    tracker.collect_at_once()
    assert [(r["step"], r.get("late")) for r in lines(tmp_path / "metrics.jsonl")] == [(0, None), (1, None), (2, 7)]
    assert "at work on the answers of 1 steps" in caplog.text
    tracker.close()
