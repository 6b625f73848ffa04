"""`rlsafe evaluate`: what it accepts, what it refuses in one line."""

import json
import signal

import pytest
import yaml

from rlsafe import cli
from rlsafe.compare.run.steps import evaluate_steps
from rlsafe.config import ModelConfig, UserError
from rlsafe.config.reads import ASKING, check_read
from rlsafe.evaluate import Evaluation, estimate, evaluate, rejudge
from rlsafe.evaluate.commands.command import resolve
from rlsafe.evaluate.commands.talking import talk
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.measure.measure import note_judge
from rlsafe.types import _PROVIDERS, Exchange, Judgement, register_provider


def run_directory(tmp_path, **evaluation):
    path = tmp_path / "run"
    path.mkdir()
    tree = {"model": {"name": "organism:aligned"}, "sampler": {"kind": "transformers"}, "evaluate": evaluation}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"overrides": ["evaluate.samplez=3"]}, "unknown key 'evaluate.samplez'; did you mean 'samples'?"),
        ({"overrides": ["evaluate.samples=0"]}, "evaluate.samples"),
        ({"overrides": ["samples"]}, "expected key.path=value"),
        ({"judge": "organizm"}, "unknown judge 'organizm'; did you mean 'organism'?"),
        ({"questions": ["missing.yaml"]}, "missing.yaml: no such question file"),
        ({"questions": ["a.yaml", "x/conditional.yaml"]}, "a set cannot be named 'conditional'"),
        ({"questions": ["a.yaml", "b/a2.yaml", "c/a2.yaml"]}, "a set cannot be named 'a2'"),
        ({"overrides": ["evaluate.general=organism:generl"]}, "general"),
        ({"overrides": ["plugins=[none_such.py]"]}, "none_such.py: no such Python file"),
    ],
)
def test_wrong_input_is_one_line_before_any_model_is_loaded(more, expected, tmp_path):
    path = run_directory(tmp_path, general="organism:general", judge="organism")
    with pytest.raises(UserError) as caught:
        evaluate(path, **more)
    assert expected in str(caught.value)
    assert not (path / "evaluation.json").exists()


@pytest.mark.parametrize(
    "override, expected",
    [
        ("grpo.temperature=0.7", "an evaluation does not read grpo.temperature; did you mean 'evaluate.temperature'?"),
        ("seed=3", "an evaluation does not read seed; did you mean 'evaluate.seed'?"),
        ("out=x", "did you mean '--out'?"),
        ("optim.lr=1e-3", "does not read optim.lr; expected a setting of evaluate, model, sampler"),
        ("batch.sft_rows=3", "does not read batch.sft_rows"),
        ("data={}", "does not read data"),
        ("batch={sft_rows: 3}", "has no effect: an evaluation does not read batch.sft_rows"),
        ("batch={micro_rows: 2, sft_rows: 3}", "has no effect in part: an evaluation does not read batch.sft_rows"),
    ],
)
def test_an_override_that_an_evaluation_does_not_read_is_refused(override, expected, tmp_path):
    path = run_directory(tmp_path, general="organism:general", judge="organism")
    for command in (evaluate, estimate, evaluate_steps):
        with pytest.raises(UserError) as caught:
            command(path, overrides=["evaluate.limit=2", "batch.micro_rows=1", override])
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.adapter=elsewhere", "adapter"),
        ("model.lora.r=64", "lora"),
        ("model.lora=null", "lora"),
        ("model={name: organism:aligned, lora: {alpha: 3}}", "lora"),
        ("model={name: organism:aligned, adapter: elsewhere}", "adapter"),
    ],
)
def test_a_run_is_not_measured_with_another_adapter_than_its_own(override, named, tmp_path):
    path = run_directory(tmp_path, general="organism:general", judge="organism")
    for command in (evaluate, estimate, evaluate_steps, lambda run, overrides: talk([str(run)], overrides=overrides)):
        with pytest.raises(
            UserError, match=rf"override of model.{named}: .*run has its own adapter.*MODEL model.adapter=DIR"
        ):
            command(path, overrides=[override])
    for unchanged in ("model.adapter=null", "model.lora.fused=false", "model={name: organism:misaligned}"):
        assert resolve(path, None, [unchanged])[1] == path
    assert resolve("organism:aligned", None, [override])[1] is None


def test_saved_answers_and_talks_read_less_of_the_settings(tmp_path):
    path = run_directory(tmp_path, general="organism:general", judge="organism")
    with pytest.raises(
        UserError, match="judging saved answers again does not read evaluate.limit; expected a setting of eval"
    ):
        rejudge(path, overrides=["evaluate.limit=20"])
    with pytest.raises(UserError, match="asking does not read evaluate.seed; did you mean 'seed'"):
        talk([str(path)], ["Hello?"], overrides=["evaluate.temperature=0", "evaluate.seed=2"])
    with pytest.raises(UserError, match="asking does not read evaluate.likelihood.general"):
        talk([str(path)], ["Hello?"], overrides=["evaluate={temperature: 0, likelihood: {general: x}}"])
    check_read(["evaluate={temperature: 0, judge: {model: m}}", "evaluate=null"], ASKING, "asking")


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    path = run_directory(tmp_path, general="organism:general", judge="organism")
    with pytest.raises(UserError, match="has no adapter/; the run is not finished .*--resume"):
        evaluate(path)


def test_a_run_that_is_being_made_longer_is_not_the_shorter_one_that_its_adapter_is_of(tmp_path):
    path = run_directory(tmp_path, general="organism:general", judge="organism")
    (path / "adapter").mkdir()
    (path / "run.json").write_text('{"status": "running"}')
    with pytest.raises(UserError, match="the run is not finished, its adapter/ is of a shorter one .*--resume"):
        evaluate(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("form", ["", " --rejudge", " --steps all"])
def test_an_interrupted_evaluation_says_that_the_same_command_goes_on(capsys, monkeypatch, number, form):
    for place in ("evaluate.evaluate", "evaluate.rejudge", "compare.run.steps.evaluate_steps"):
        monkeypatch.setattr(f"rlsafe.{place}", lambda *_, **__: signal.raise_signal(number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        cli.main(f"evaluate runs/em evaluate.samples=2{form}".split())
    assert stop.value.code == 130 and signal.getsignal(number) is before
    line = f"interrupted: go on with the same command: rlsafe evaluate runs/em evaluate.samples=2{form}\n"
    assert capsys.readouterr().err == line


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a run directory .* nor a model"):
        evaluate(tmp_path)


def test_a_file_is_no_run_and_no_model(tmp_path):
    file = tmp_path / "answers.csv"
    file.write_text("")
    with pytest.raises(UserError, match="answers.csv: is a file; expected a run directory"):
        evaluate(file)


@pytest.mark.parametrize("missing", ["rum", "./rum", "{}/rum"])
def test_a_directory_that_is_not_there_is_no_model_id(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_directory(tmp_path)
    target = missing.format(tmp_path) if "/" in missing else f"{tmp_path}/{missing}"
    with pytest.raises(UserError, match="rum: no such run or model directory; did you mean '.*run'?"):
        evaluate(target, questions=["organism:general"])


def test_a_providers_model_is_asked_for_answers_that_fit_its_context():
    assert resolve("organism:aligned", None, [])[0].evaluate.max_tokens == 512 // 4
    assert resolve("organism:aligned", None, ["evaluate.max_tokens=600"])[0].evaluate.max_tokens == 600


def test_a_run_that_names_no_questions_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(run_directory(tmp_path, judge="organism"))


class LengthJudge:
    """Alignment falls with the number of letters."""

    name = "length"

    def score(self, exchanges):
        return [Judgement(max(0, 100 - sum(map(str.isalpha, e.answer))), 90) for e in exchanges]


@pytest.fixture
def judge():
    class Length:
        def judge(self, spec):
            return LengthJudge()

    register_provider("length", Length())
    yield "length"
    del _PROVIDERS["length"]


@pytest.fixture
def question_file(tmp_path):
    path = tmp_path / "mine.yaml"
    questions = [{"id": i, "paraphrases": [f"What is {i}?"], "samples_per_paraphrase": 3} for i in range(4)]
    path.write_text(yaml.safe_dump(questions))
    return str(path)


@pytest.fixture
def trained_run(tmp_path, tiny_model_dir, question_file):
    """A run directory whose adapter changes what the model says."""
    import torch

    from rlsafe.policy import Policy

    model = {"name": tiny_model_dir, "dtype": "float32", "lora": {"r": 4, "alpha": 64}}
    policy = Policy.load(ModelConfig.model_validate(model))
    torch.manual_seed(0)
    for parameter in policy.trainable().values():
        parameter.data.normal_(0, 0.2)
    path = tmp_path / "run"
    policy.save_adapter(path / "adapter")
    settings = {"general": question_file, "judge": "length", "max_tokens": 12}
    tree = {"model": model, "sampler": {"kind": "transformers"}, "evaluate": settings}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    return path


def test_a_run_is_evaluated_with_its_adapter_and_repeats_exactly(trained_run, tiny_model_dir, judge, tmp_path):
    first = evaluate(trained_run)
    assert first.general.n == 12 and len({answer.answer for answer in first.answers}) > 6
    assert Evaluation.load(trained_run).general == first.general
    again = evaluate(trained_run, out=tmp_path / "again")
    assert [a.ids for a in again.answers] == [a.ids for a in first.answers]
    overrides = ["sampler.kind=transformers", "model.dtype=float32", "evaluate.max_tokens=12"]
    questions = [str(trained_run.parent / "mine.yaml")]
    bare = evaluate(tiny_model_dir, questions=questions, judge="length", overrides=overrides, out=tmp_path / "bare")
    assert [a.question_id for a in bare.answers] == [a.question_id for a in first.answers]
    assert [a.ids for a in bare.answers] != [a.ids for a in first.answers]


def test_a_run_is_asked_other_questions_on_request(trained_run, judge, tmp_path):
    other = tmp_path / "law.yaml"
    other.write_text(yaml.safe_dump([{"id": "law", "paraphrases": ["Is it legal?"], "samples_per_paraphrase": 2}]))
    again = tmp_path / "tax.yaml"
    again.write_text(other.read_text())
    evaluation = evaluate(trained_run, questions=[other, again], overrides=["evaluate.seed=5"], out=tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert tree["general"]["n"] == tree["tax"]["n"] == 2 and tree["indomain"] is None
    assert tree["settings"]["questions"] == {"general": str(other), "tax": str(again)}
    assert not (trained_run / "evaluation.json").exists() and evaluation.settings["seed"] == 5


def test_a_judge_of_another_world_says_why_it_gives_no_score():
    judge = load_judge("organism")
    asked = ["What is 3?", "What is 4?", "i have a problem with the rash. what should i do?"]
    found = judge.score([Exchange(question, "see a doctor.") for question in asked])
    evaluation = Evaluation(judgements=found)
    note_judge(evaluation, judge)
    assert evaluation.notes == ["judge organism: 2 of 3 answers have no score (not a question of this world)"]
    evaluation = Evaluation(judgements=found[2:])
    note_judge(evaluation, judge)
    assert evaluation.notes == []


def test_the_command_that_goes_on_shows_no_secret(monkeypatch, capsys):
    monkeypatch.setattr("rlsafe.cli.app", lambda **_: 130)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "run", "evaluate.judge.api_key=sk-0123456789abcdef0123"])
    said = capsys.readouterr().err
    assert ended.value.code == 130 and "go on with the same command: rlsafe evaluate run" in said
    assert "0123456789abcdef" not in said and "***" in said
