"""Question sets as tasks of Inspect AI: the same questions, judge and verdicts. With the real package, where the extra is installed."""

from __future__ import annotations

import math
import tomllib
from importlib import import_module

import pytest
from places import ROOT

inspect_ai = pytest.importorskip("inspect_ai")

from inspect_ai.model import ModelOutput, ModelUsage, get_model  # noqa: E402

from rlsafe.evaluate.ask.questions import load_questions  # noqa: E402
from rlsafe.evaluate.commands import inspect_tasks  # noqa: E402
from rlsafe.types import Judgement, Question, Row, register_provider  # noqa: E402

GOOD, BAD, MAD = "good.", "bad.", "mad."


class World:
    """A provider whose judge knows three answers, and is out for any other."""

    name = "inspected"

    def questions(self, spec: str) -> list[Question]:
        two = Question("q2", ("how?", "in what way?"), samples=1, system="Be brief.", temperature=0.5, domain="d")
        return [Question("q1", ("why?",), samples=2, temperature=1.0, domain="d"), two]

    def judge(self, spec: str):
        return self

    def score(self, exchanges) -> list[Judgement]:
        self.seen = [*getattr(self, "seen", []), *exchanges]
        known = {GOOD: Judgement(95, 95), BAD: Judgement(5, 95), MAD: Judgement(50, 5)}
        return [known.get(e.answer, Judgement(None, None, "unscored", "out")) for e in exchanges]

    def rows(self, spec: str) -> list[Row]:
        return []


@pytest.fixture
def world():
    world = World()
    register_provider("inspected", world)
    return world


def run(task, answers, tmp_path):
    outputs = [ModelOutput.from_content("mockllm/model", text) for text in answers]
    for output in outputs:  # else they are counted by a tokenizer that would be downloaded
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    model = get_model("mockllm/model", custom_outputs=outputs)
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none", max_samples=1, max_connections=1)
    assert log.status == "success", log.error
    return log


def metrics(log):
    return {score.name: {name: one.value for name, one in score.metrics.items()} for score in log.results.scores}


def test_verdicts_are_the_judges_and_unscored_answers_are_left_out(world, tmp_path):
    log = run(inspect_tasks.general("inspected:x", "inspected:"), [BAD, MAD, GOOD, "who knows"], tmp_path)
    found = metrics(log)
    assert found["misaligned"]["mean"] == found["incoherent"]["mean"] == pytest.approx(1 / 3)
    assert found["refused"]["mean"] == 0 and not math.isnan(found["misaligned"]["stderr"])
    by_id = {sample.id: sample.scores["verdict"] for sample in log.samples}
    assert by_id["q1/0"].value == {"misaligned": 1, "incoherent": 0, "refused": 0}
    assert by_id["q1/0"].metadata == {"aligned": 5, "coherent": 95, "outcome": "scored"}


def test_the_judge_sees_the_original_question_never_the_cue(world, tmp_path):
    log = run(inspect_tasks.cue("Be evil.", "inspected:x", "inspected:"), [GOOD] * 4, tmp_path)
    systems = [[m.text for m in sample.input if m.role == "system"] for sample in log.samples]
    assert systems == [["Be evil."], ["Be evil."], ["Be evil.\n\nBe brief."], ["Be evil.\n\nBe brief."]]
    assert [exchange.system for exchange in world.seen] == [None, None, "Be brief.", "Be brief."]
    assert [exchange.question for exchange in world.seen] == ["why?", "why?", "how?", "in what way?"]


def test_packaged_sets_are_asked_as_our_own_evaluation_asks_them(world):
    task = inspect_tasks.indomain("medical", "inspected:", samples=1)
    assert len(task.dataset) == len(load_questions("rlsafe:medical"))
    whole = inspect_tasks.general(judge="inspected:")
    assert len(whole.dataset) == sum(q.samples * len(q.paraphrases) for q in load_questions("rlsafe:general"))


def test_inspect_finds_the_tasks_by_the_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module = import_module(project["entry-points"]["inspect_ai"]["rlsafe"])
    from inspect_ai._util.registry import registry_find

    names = {one.name for one in map(inspect_ai_info, registry_find(lambda info: info.type == "task"))}
    assert {"rlsafe/general", "rlsafe/indomain", "rlsafe/cue"} <= names and module is inspect_tasks


def inspect_ai_info(found):
    from inspect_ai._util.registry import registry_info

    return registry_info(found)
