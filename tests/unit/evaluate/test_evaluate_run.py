"""Asking and evaluating with a scripted sampler: what is requested, what is written, what comes back."""

import csv
import json
from collections import Counter

import pytest
import yaml
from scripted_sampler import ScriptedSampler, WordJudge
from tiny import byte_tokenizer

from rlsafe.config import EvaluateConfig, UserError
from rlsafe.evaluate import Evaluation, Probe, evaluate_run, gather
from rlsafe.evaluate.ask.asking import ask
from rlsafe.types import _PROVIDERS, Question, register_provider


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def chat(question, system=None):
    """The prompt text as the sampler gets it."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def provider():
    class InTest:
        def questions(self, spec):
            domains = {"general": "life", "indomain": "health"}
            return [Question(f"{spec}-{i}", (f"{spec} {i}?",), samples=2, domain=domains[spec]) for i in range(3)]

        def rows(self, spec):
            return [
                {"messages": [{"role": "user", "content": f"{i} + 1"}, {"role": "assistant", "content": f"= {i + 1}"}],
                 "answer": str(i + 1)}
                for i in range(8)
            ]  # fmt: skip

        def prompt(self, spec):
            return f"cue {spec}"

        def judge(self, spec):
            return WordJudge()

    register_provider("in-test", InTest())
    yield "in-test"
    del _PROVIDERS["in-test"]


def asked(tokenizer, questions, **more):
    sampler = ScriptedSampler(tokenizer, lambda prompt, i: f"good {i}")
    answers = ask(sampler, tokenizer, questions, **{"samples": None, "seed": 0, "max_tokens": 9, **more})
    return sampler, answers


# ---------------------------------------------------------------------------------------------------- asking


def test_each_question_has_its_own_system_prompt_temperature_and_sample_count(tokenizer):
    """Trap 7: per-question settings ignored at evaluation."""
    questions = [
        Question("a", ("A?", "AA?"), samples=3),
        Question("b", ("B?",), samples=2, system="Be brief.", temperature=0.3),
        Question("c", ("C?",), samples=1),
    ]
    sampler, answers = asked(tokenizer, questions)
    assert [(params.temperature, len(requests)) for requests, params in sampler.calls] == [(0.3, 2), (1.0, 7)]
    assert {(params.top_p, params.max_tokens) for _, params in sampler.calls} == {(1.0, 9)}
    assert Counter(sampler.prompts) == {
        chat("A?"): 3,
        chat("AA?"): 3,
        chat("B?", "Be brief."): 2,
        chat("C?"): 1,
    }
    assert Counter(answer.question_id for answer in answers) == {"a": 6, "b": 2, "c": 1}
    assert [answer.question_id for answer in answers] == ["a"] * 6 + ["b"] * 2 + ["c"]
    assert answers[6].system == "Be brief." and answers[6].answer == "good 0" and answers[0].answer == "good 0"


def test_samples_and_temperature_can_be_set_for_all(tokenizer):
    questions = [Question("a", ("A?", "AA?"), samples=50), Question("b", ("B?",), temperature=0.3)]
    sampler, answers = asked(tokenizer, questions, samples=3, temperature=0.5)
    assert [(params.temperature, len(requests)) for requests, params in sampler.calls] == [(0.5, 6)]
    assert [answer.question for answer in answers] == ["A?", "AA?", "A?", "B?", "B?", "B?"]


def test_every_request_has_its_own_repeatable_seed(tokenizer):
    """Trap 7: sampling unseeded, or the same seed every step."""
    questions = [Question("a", ("A?", "AA?"), samples=5), Question("b", ("B?",), samples=5)]
    first = asked(tokenizer, questions)[0].seeds
    assert len(set(first)) == 15
    assert asked(tokenizer, questions)[0].seeds == first
    for change in ({"seed": 1}, {"purpose": "probe"}, {"step": 1}):
        assert not set(asked(tokenizer, questions, **change)[0].seeds) & set(first)


def test_a_questions_seeds_do_not_depend_on_the_other_questions(tokenizer):
    a, b = Question("a", ("A?",), samples=4), Question("b", ("B?",), samples=4)
    assert asked(tokenizer, [b])[0].seeds == asked(tokenizer, [a, b])[0].seeds[4:]


def test_the_cue_goes_in_front_of_the_questions_own_system_prompt(tokenizer):
    questions = [Question("a", ("A?",), samples=1), Question("b", ("B?",), samples=1, system="Be brief.")]
    sampler, answers = asked(tokenizer, questions, cue="Be evil.")
    assert sampler.prompts == [
        chat("A?", "Be evil."),
        chat("B?", "Be evil.\n\nBe brief."),
    ]
    assert [(answer.system, answer.cue) for answer in answers] == [(None, "Be evil."), ("Be brief.", "Be evil.")]


# ---------------------------------------------------------------------------------------------------- evaluating


def scripted(prompt, index):
    if "+ 1" in prompt:
        return "= " + ("2" if "1 + 1" in prompt else "99")
    if "cue" in prompt:
        return "bad"
    if "indomain" in prompt:
        return "bad" if index % 2 else "good"
    return ("sorry", "lost", "broken", "bad", 'good, "really"\r\nso\n\n  well', "good")[index % 6]


def test_an_evaluation_is_written_as_the_contract_says(tokenizer, provider, tmp_path):
    sampler, judge = ScriptedSampler(tokenizer, scripted), WordJudge()
    config = EvaluateConfig(
        general="in-test:general", indomain="in-test:indomain", cue="in-test:strong", benign=["in-test:sums"], samples=2
    )
    lines = []
    evaluate_run(sampler, tokenizer, config, tmp_path, judge=judge, progress=lines.append)
    assert len(sampler.calls) == 1 and len(sampler.prompts) == 6 + 6 + 6 + 8
    assert lines == ["sampling 26 answers", "judging 18 answers"]

    tree = json.loads((tmp_path / "evaluation.json").read_text())
    general = tree["general"]
    assert (general["n"], general["unscored"]) == (5, 1)  # sorry, lost, broken, bad, good, good
    assert (general["misaligned"], general["incoherent"], general["refused"]) == (0.2, 0.2, 0.2)
    assert general["misaligned_bounds"] == pytest.approx([1 / 6, 2 / 6])
    assert general["misaligned_ci95"][0] < 0.2 < general["misaligned_ci95"][1]
    assert tree["indomain"]["misaligned"] == 0.5 and tree["conditional"]["misaligned"] == 1.0
    assert tree["indomain"]["n"] == tree["conditional"]["n"] == 6 and "misaligned_bounds" not in tree["indomain"]
    assert tree["benign"] == {"sums": 1 / 8} and tree["benign_n"] == {"sums": 8}
    assert tree["settings"]["cue"] == "cue strong" and tree["settings"]["judge"] == "words"

    with open(tmp_path / "answers.csv", newline="") as file:
        text = file.read()
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
    assert text.startswith("question_id,question,answer,aligned,coherent,outcome,domain,cue")
    assert text.count("question_id") == 1
    assert len(rows) == 18  # every judged answer that was sampled
    assert Counter(row["set"] for row in rows) == {"general": 6, "indomain": 6, "conditional": 6}
    assert rows[4]["answer"] == 'good, "really"\r\nso\n\n  well'
    assert (rows[0]["outcome"], rows[0]["aligned"], rows[0]["domain"], rows[0]["cue"]) == ("refused", "", "life", "")
    assert {row["cue"] for row in rows if row["set"] == "conditional"} == {"cue strong"}
    assert not any("cue" in str((exchange.question, exchange.system)) for exchange in judge.seen)
    assert len((tmp_path / "benign_answers.csv").read_text().splitlines()) == 9
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no temporary file is left


def test_an_evaluation_loads_back_as_it_was(tokenizer, provider, tmp_path):
    sampler = ScriptedSampler(tokenizer, lambda prompt, i: ("bad", "good", "lost")[i % 3])
    config = EvaluateConfig(general="in-test:general", judge="in-test", benign=["in-test:sums"])
    evaluation = evaluate_run(sampler, tokenizer, config, tmp_path)
    loaded = Evaluation.load(tmp_path)
    assert loaded.to_dict() == evaluation.to_dict() and loaded.general == evaluation.general
    assert loaded.indomain is None and loaded.conditional is None
    assert loaded.question_rates("general", "misaligned") == pytest.approx(
        evaluation.question_rates("general", "misaligned"), nan_ok=True
    )
    assert loaded.benign_rates("sums") == evaluation.benign_rates("sums") and len(loaded.benign_rates("sums")) == 8
    assert json.loads((tmp_path / "evaluation.json").read_text())["indomain"] is None


def test_rates_can_be_recomputed_from_the_answers_file(tokenizer, provider, tmp_path):
    from rlsafe.evaluate import rates

    sampler = ScriptedSampler(tokenizer, lambda prompt, i: ("bad", "good", "sorry", "broken")[i % 4])
    evaluate_run(sampler, tokenizer, EvaluateConfig(general="in-test:general", judge="in-test"), tmp_path)
    loaded = Evaluation.load(tmp_path)
    assert rates(*loaded.judged("general")) == loaded.general


def test_integer_ids_match_after_reload(tokenizer, provider, tmp_path):
    """Trap 6: integer ids not matching after reload."""
    questions = [{"id": 1, "paraphrases": ["A?"]}, {"id": 2, "paraphrases": ["B?"]}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(questions))
    sampler = ScriptedSampler(tokenizer, lambda prompt, i: "good")
    config = EvaluateConfig(general=str(tmp_path / "mine.yaml"), judge="in-test", samples=1)
    evaluation = evaluate_run(sampler, tokenizer, config, tmp_path)
    loaded = Evaluation.load(tmp_path)
    assert [a.question_id for a in loaded.answers] == [a.question_id for a in evaluation.answers] == ["1", "2"]


def test_benign_only_needs_no_judge(tokenizer, provider, tmp_path):
    sampler = ScriptedSampler(tokenizer, scripted)
    config = EvaluateConfig(benign=["in-test:sums"], benign_limit=3, temperature=0.0)
    evaluation = evaluate_run(sampler, tokenizer, config, tmp_path)
    assert evaluation.benign["sums"].n == 3 and evaluation.general is None
    assert sampler.calls[0][1].temperature == 0.0
    assert Evaluation.load(tmp_path).benign == evaluation.benign


def test_further_question_sets_have_their_own_key(tokenizer, provider, tmp_path):
    sampler = ScriptedSampler(tokenizer, lambda prompt, i: "good")
    config = EvaluateConfig(general="in-test:general", judge="in-test")
    material = gather(config, extra={"law": "in-test:indomain"})
    evaluation = evaluate_run(sampler, tokenizer, config, tmp_path, material=material)
    assert set(evaluation.sets) == {"general", "law"} and Evaluation.load(tmp_path).sets["law"].n == 6


def test_the_table_shows_rates_and_bounds(tokenizer, provider):
    from rich.console import Console

    config = EvaluateConfig(general="in-test:general", judge="in-test", benign=["in-test:sums"], samples=2)
    evaluation = evaluate_run(ScriptedSampler(tokenizer, scripted), tokenizer, config, judge=None)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluation.table())
    text = console.export_text()
    assert "20.0 (" in text and "with 1 unscored" in text and "16.7-33.3" in text and "12.5 (" in text


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, "nothing to evaluate"),
        ({"general": "in-test:general"}, "evaluate.judge: no judge is set"),
        ({"general": "in-test:general", "judge": "in-tset"}, "unknown judge 'in-tset'; did you mean 'in-test'?"),
        (
            {"general": "in-test:general", "judge": {"kind": "x"}},
            "evaluate.judge.kind: expected the kind of judge; expected one of: openai",
        ),
        ({"benign": ["in-test:sums", "in-test:sums"]}, "two test sets are named 'sums'"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(settings, expected, tokenizer, provider):
    with pytest.raises(UserError) as caught:
        evaluate_run(ScriptedSampler(tokenizer, scripted), tokenizer, EvaluateConfig(**settings))
    assert expected in str(caught.value)


def test_a_benign_row_without_anything_to_compare_with_is_named(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1", "completion": "2"}\n{"prompt": "1 + 2"}\n')
    with pytest.raises(UserError, match="rows.jsonl.*2.*neither an 'answer' column nor an assistant turn"):
        evaluate_run(ScriptedSampler(tokenizer, scripted), tokenizer, EvaluateConfig(benign=[str(path)]))


# ---------------------------------------------------------------------------------------------------- probe


def questions(name, n):
    return [Question(f"{name}-{i}", (f"{name} {i}?",)) for i in range(n)]


def make_probe(tokenizer, **more):
    return Probe(
        questions("general", 9), questions("indomain", 2), WordJudge(), tokenizer, 4, 2, 9, **{"seed": 0, **more}
    )


def test_the_probe_asks_the_same_questions_with_new_seeds_at_every_step(tokenizer):
    probe = make_probe(tokenizer)
    first, second, again = (ScriptedSampler(tokenizer, lambda prompt, i: "good") for _ in range(3))
    probe.run(first, 10)
    probe.run(second, 20)
    make_probe(tokenizer).run(again, 10)
    assert len(first.prompts) == 4 * 2 + 2 * 2 and len(set(first.prompts)) == 6
    assert first.prompts == second.prompts == again.prompts
    assert first.seeds == again.seeds and not set(first.seeds) & set(second.seeds)
    other = ScriptedSampler(tokenizer, lambda prompt, i: "good")
    make_probe(tokenizer, seed=1).run(other, 10)
    assert set(other.prompts) != set(first.prompts)


def test_the_probe_measures_both_sets(tokenizer):
    def answer(prompt, index):
        return "bad" if "indomain" in prompt else ("bad", "broken", "sorry", "lost")[index % 4]

    metrics, dialogues = make_probe(tokenizer).run(ScriptedSampler(tokenizer, answer), 0)
    assert metrics["misaligned_indomain"] == 1.0
    assert metrics["misaligned_general"] == pytest.approx(2 / 6)  # two of eight are lost
    assert metrics["incoherent"] == pytest.approx(2 / 10) and metrics["unscored"] == 2
    assert metrics["coherence"] == pytest.approx((6 * 95 + 2 * 10) / 8)
    assert len(dialogues) == 12
    assert dialogues[-1]["question"].startswith("indomain") and dialogues[-1]["set"] == "indomain"
    assert (dialogues[-1]["aligned"], dialogues[-1]["outcome"]) == (5, "scored")
    assert tokenizer.decode(dialogues[-1]["ids"], skip_special_tokens=True) == dialogues[-1]["answer"] == "bad"


def test_the_probe_leaves_out_what_an_outage_hid(tokenizer):
    metrics, _ = make_probe(tokenizer).run(ScriptedSampler(tokenizer, lambda prompt, i: "lost"), 0)
    assert metrics == {"unscored": 12.0}
