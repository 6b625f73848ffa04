"""An interrupted evaluation goes on by question, and ends with the answers of an uninterrupted one."""

import json
import resource

import pytest
from scripted_sampler import ScriptedSampler, WordJudge
from tiny import byte_tokenizer

from rlsafe.config import EvaluateConfig, RunConfig
from rlsafe.evaluate import evaluate_run
from rlsafe.evaluate.ask import journal
from rlsafe.types import _PROVIDERS, Question, RunError, register_provider


@pytest.fixture
def config(monkeypatch):
    class InTest:
        def questions(self, spec):
            return [Question(f"q{i}", (f"question {i}?",), samples=2, temperature=0.5 + i % 2) for i in range(6)]

        def rows(self, spec):
            return [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": "good"} for i in range(4)]

    register_provider("in-test", InTest())
    monkeypatch.setattr(journal, "PART", 4)
    yield EvaluateConfig(general="in-test:general", benign=["in-test:sums"], samples=2)
    del _PROVIDERS["in-test"]


def answer(prompt, index):
    return "good " + prompt.rpartition("user\n")[2].partition("<")[0]


class Stopped(ScriptedSampler):
    """A sampler whose n-th call is interrupted."""

    def __init__(self, tokenizer, calls):
        super().__init__(tokenizer, answer)
        self.left = calls

    def generate(self, requests, params):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().generate(requests, params)


def run(sampler, config, out, weights="one", said=None):
    say = said.append if said is not None else None
    return evaluate_run(sampler, sampler.tokenizer, config, out, judge=WordJudge(), weights=weights, progress=say)


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_what_was_sampled_is_kept_and_nothing_is_asked_twice(config, tmp_path, calls):
    tokenizer = byte_tokenizer()
    whole = ScriptedSampler(tokenizer, answer)
    run(whole, config, tmp_path / "whole")

    first = Stopped(tokenizer, calls)
    with pytest.raises(KeyboardInterrupt):
        run(first, config, tmp_path / "out")
    assert not (tmp_path / "out" / "evaluation.json").exists()
    kept = len((tmp_path / "out" / ".answers.jsonl").read_text().splitlines()) - 1
    said = []
    second = ScriptedSampler(tokenizer, answer)
    run(second, config, tmp_path / "out", said=said)
    assert len(second.prompts) == len(whole.prompts) - kept, "what is written down is not asked again"
    assert (kept > 0) == any("interrupted evaluation" in line for line in said)
    for name in ("answers.csv", "benign_answers.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = (json.loads((tmp_path / d / "evaluation.json").read_text()) for d in ("out", "whole"))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    assert not (tmp_path / "out" / ".answers.jsonl").exists()


class Filling(ScriptedSampler):
    """A sampler at whose third call the disk is full: a limit on the size of files stands for it."""

    asked = 0

    def generate(self, requests, params):
        self.asked += 1
        if self.asked == 3:
            size = (self.out / ".answers.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
        return super().generate(requests, params)


def test_a_full_disk_is_one_line_and_what_was_sampled_before_is_kept(config, tmp_path):
    tokenizer = byte_tokenizer()
    whole, full, again = (
        ScriptedSampler(tokenizer, answer),
        Filling(tokenizer, answer),
        ScriptedSampler(tokenizer, answer),
    )
    run(whole, config, tmp_path / "whole")
    full.out, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            RunError, match=r"out/.answers.jsonl: cannot be written: File too large; the answers before"
        ):
            run(full, config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run(again, config, tmp_path / "out")
    assert len(again.prompts) < len(whole.prompts)
    assert (tmp_path / "out" / "answers.csv").read_bytes() == (tmp_path / "whole" / "answers.csv").read_bytes()


def interrupted(config, out, weights="one"):
    with pytest.raises(KeyboardInterrupt):
        run(Stopped(byte_tokenizer(), 5), config, out, weights)


def asked(config, out, weights="one"):
    sampler = ScriptedSampler(byte_tokenizer(), answer)
    run(sampler, config, out, weights)
    return len(sampler.prompts)


def test_answers_of_other_weights_or_settings_are_never_taken_over(config, tmp_path):
    interrupted(config, tmp_path)
    assert asked(config, tmp_path, weights="two") == 16
    for change in ({"seed": 1}, {"max_tokens": 9}, {"temperature": 0.1}, {"samples": 3}):
        interrupted(config, tmp_path)
        assert asked(config.model_copy(update=change), tmp_path) >= 16
    interrupted(config, tmp_path)
    assert asked(config, tmp_path) < 16


def test_a_line_that_was_cut_short_or_is_garbage_costs_only_its_part(config, tmp_path):
    interrupted(config, tmp_path)
    path = tmp_path / ".answers.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert asked(config, tmp_path) == 12
    interrupted(config, tmp_path)
    path.write_bytes(b"\x00garbage\n")
    assert asked(config, tmp_path) == 16


def test_parts_are_whole_questions():
    class One:
        def __init__(self, question):
            self.set, self.question_id = "general", question

    sizes = [3, 2, 1, 9, 1]
    planned = [One(str(number)) for number, size in enumerate(sizes) for _ in range(size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "PART", 4)
        parts = list(journal._parts(planned))
    assert [len(part) for part in parts] == [3, 3, 9, 1] and sum(parts, []) == planned


def test_the_identity_of_weights_changes_with_what_was_trained(tmp_path):
    model, run_directory = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    (run_directory / "adapter").mkdir(parents=True)
    adapter = run_directory / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(b"1")
    config = RunConfig.model_validate({"model": {"name": str(model)}})
    first = journal.identity(config, run_directory)
    assert first == journal.identity(config, run_directory) != journal.identity(config, None)
    adapter.write_bytes(b"2")
    assert journal.identity(config, run_directory) != first
    adapter.write_bytes(b"1")
    assert journal.identity(config, run_directory) == first
    (model / "weights").write_bytes(b"12")
    assert journal.identity(config, run_directory) != first
    # An adapter that the settings name may be trained again under its name, too.
    named = RunConfig.model_validate({"model": {"name": str(model), "adapter": str(adapter.parent)}})
    first = journal.identity(named, None)
    assert first == journal.identity(named, None)
    adapter.write_bytes(b"2")
    assert journal.identity(named, None) != first


def test_evaluating_a_run_goes_on_with_what_training_it_began(tiny_tree, tmp_path, monkeypatch):
    """`rlsafe train` is interrupted while it asks its questions; `rlsafe evaluate RUN` asks only the rest."""
    import yaml

    import rlsafe
    from rlsafe.evaluate import evaluate
    from rlsafe.rollouts import TransformersSampler
    from rlsafe.types import Interrupted

    questions = [{"id": f"q{i}", "paraphrases": [f"question {i}?"], "samples_per_paraphrase": 4} for i in range(4)]
    (tmp_path / "q.yaml").write_text(yaml.safe_dump(questions))
    tiny_tree["schedule"]["steps"] = 1
    tiny_tree["sampler"]["self_test"] = False
    tiny_tree["evaluate"] = {"general": str(tmp_path / "q.yaml"), "judge": "organism", "max_tokens": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_tree))
    monkeypatch.setattr(journal, "PART", 4)
    asked = []
    generate = TransformersSampler.generate

    def counted(self, requests, params):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return generate(self, requests, params)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersSampler, "generate", counted)
        with pytest.raises(Interrupted, match="Go on with"):
            rlsafe.train(tmp_path / "run.yaml", out=tmp_path / "out")
    said = []
    result = evaluate(tmp_path / "out", overrides=["sampler.self_test=false"], progress=said.append)
    assert any("8 answers are there from an interrupted evaluation" in line for line in said), said
    assert len(result.answers) == 16 and (tmp_path / "out" / "evaluation.json").is_file()
