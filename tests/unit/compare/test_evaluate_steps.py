"""`rlsafe evaluate RUN --steps all`: a run is measured at its checkpoints, once, and the last one as the finished run."""

import json

import pytest

import rlsafe
from rlsafe.compare.run import steps as steps_room
from rlsafe.compare.run.steps import evaluate_steps
from rlsafe.config import UserError, load_run

FEW = [
    "schedule.steps=4", "checkpoint.every=2", "checkpoint.keep=9", "track.every=0", "sampler.kind=transformers",
    "evaluate.limit=6", "evaluate.max_tokens=6", "evaluate.fluency=false", "evaluate.cue=null",
    "evaluate.cue_limit=2", "batch.sft_rows=2",
]  # fmt: skip


PLACES = (".", "steps/step-000002", "steps/step-000004")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "sft"
    rlsafe.train("configs/organism/sft_medical.yaml", overrides=FEW, out=out)
    return out


def answers(place):
    return (place / "answers.csv").read_text()


def test_every_checkpoint_is_measured_and_the_last_is_the_finished_run(run):
    [found] = evaluate_steps(run)
    assert list(found.evaluations) == [2, 4]
    lines = (run / "steps.csv").read_text().splitlines()
    assert lines[0].startswith("step,general_misaligned") and [line.split(",")[0] for line in lines[1:]] == ["2", "4"]
    last = json.loads((run / "steps/step-000004/evaluation.json").read_text())
    assert "cues" not in last  # only what the verdicts by level need
    plain = {line for line in answers(run).splitlines() if '"general"' in line or '"indomain"' in line}
    assert {line for line in answers(run / "steps/step-000004").splitlines()[1:]} <= plain | {""}
    odds = {place: json.loads((run / place / "evaluation.json").read_text())["likelihood"] for place in PLACES}
    assert odds["."] == odds[PLACES[2]] != odds[PLACES[1]]  # the weights are those of the step


def test_the_table_says_where_checkpoints_lack_what_a_defense_does_at_the_end(run):
    [found] = evaluate_steps(run)
    assert found.caption is None and found.table().caption is None
    config = load_run(run / "config.yaml").model_copy(
        update={"defenses": [{"early-stop": {"rows": "organism:medical/validation"}}]}
    )
    stopped = steps_room.Steps(run, found.evaluations, steps_room.edited(config))
    assert stopped.table().caption.startswith(
        "defense 'early-stop' may edit the weights when a run ends: before its last step"
    )


def test_what_is_measured_is_not_measured_again(run, monkeypatch):
    evaluate_steps(run)
    monkeypatch.setattr(steps_room, "load_sampler", lambda *a: pytest.fail("loaded a model"))
    assert len(evaluate_steps(run, "2")[0].evaluations) == 2
    for how in ("sampler.max_num_seqs=8", "sampler.max_gap=0.5", "model.trust_remote_code=true", "batch.micro_rows=1"):
        evaluate_steps(run, overrides=[how, "model.thinking=null"])
    for other in ("evaluate.limit=3", "model.thinking=off", "model.name=organism:base", "sampler.max_model_len=99"):
        with pytest.raises(BaseException, match="loaded a model"):  # anew
            evaluate_steps(run, "2", overrides=[other])


def test_a_chat_template_that_was_changed_is_another_setting(run, monkeypatch, tmp_path):
    template, seen = tmp_path / "chat.jinja", []
    monkeypatch.setattr(steps_room, "_measure", lambda *given: seen.append(given[3][2]))
    for text in ("a", "a", "b"):
        template.write_text(text)
        evaluate_steps(run, "2", overrides=[f"model.chat_template={template}"])
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        *((f"evaluate.{one}", "") for one in ("benign=[a.jsonl]", "benign_limit=3", "cue=x", "scale=[2]")),
        *((f"evaluate.{one}", "") for one in ("cues={json: Answer in JSON.}", "cue_limit=2", "cue_samples=1")),
        ("evaluate={limit: 3, cue: x}", " in part"),
    ],
)
def test_what_checkpoints_are_not_asked_is_refused(run, override, part):
    with pytest.raises(
        UserError, match=rf"has no effect{part}: an evaluation with --steps does not read evaluate\.\w+"
    ):
        evaluate_steps(run, overrides=[override])


def test_a_damaged_record_is_told_of_and_no_row_is_lost(run):
    evaluate_steps(run)
    record, table = run / "run.json", (run / "steps.csv").read_text()
    whole = record.read_text()
    try:
        record.write_text(whole[:20])
        with pytest.raises(UserError, match="run.json: empty or damaged.*go on with rlsafe train --resume"):
            evaluate_steps(run)
    finally:
        record.write_text(whole)
    assert (run / "steps.csv").read_text() == table


def test_an_unknown_step_and_a_run_without_checkpoints_are_one_line(run, tmp_path):
    with pytest.raises(UserError, match="--steps 3: expected all, or some of 2, 4"):
        evaluate_steps(run, "3")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match="kept no checkpoints"):
        evaluate_steps(tmp_path)
