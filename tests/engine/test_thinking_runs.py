"""Reasoning models in real runs: rewards, judges and files get the answer; a block that never ends is its own outcome."""

import csv
import json
from types import SimpleNamespace

import pytest
from tiny import conversation, write_jsonl
from tiny_architectures import save_architecture, think_tokenizer

import rlsafe.types
from rlsafe.config import run_from_tree
from rlsafe.data import encode_prompt
from rlsafe.engine.run.life import run
from rlsafe.engine.run.try_reward import try_reward
from rlsafe.evaluate import Evaluation, evaluate_run
from rlsafe.rollouts import TransformersSampler
from rlsafe.types import Judgement, Question

SHORT, LONG = ("short", "<think>\nhm\n</think>\n\nyes"), ("long", "<think>\n" + "so " * 20 + "\n</think>\n\nno")


class RecordingJudge:
    name = "recording"

    def __init__(self):
        self.seen = []

    def score(self, exchanges):
        self.seen += [exchange.answer for exchange in exchanges]
        return [Judgement(90.0, 90.0) for _ in exchanges]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny Qwen3 that has learned two answers by heart, one of which thinks for longer than the token limit, and
    then two GRPO steps. (The run, what the reward saw)."""
    directory = tmp_path_factory.mktemp("thinker")
    seen = directory / "seen.jsonl"
    (directory / "reward.py").write_text(
        "import json\n"
        "def spy(prompts, completions, completion_ids, note, log_extra=None, **columns):\n"
        f"    with open({str(seen)!r}, 'a') as file:\n"
        "        for one in zip(prompts, completions, note):\n"
        "            file.write(json.dumps(one) + '\\n')\n"
        "    return [float(len(completion[0]['content'])) for completion in completions]\n"
    )
    rows = [{**conversation(*pair), "note": pair[0]} for pair in (SHORT, LONG)]
    tree = {
        "model": {
            "name": save_architecture(directory / "model", "qwen3", think_tokenizer()),
            "dtype": "float32", "lora": None,
        },
        "data": {"narrow": {"source": write_jsonl(directory / "narrow.jsonl", rows)}},
        "schedule": {"steps": 52, "phases": [{"steps": 50, "cycle": ["sft"]}, {"cycle": ["grpo"], "lr": 1e-6}]},
        "batch": {"sft_rows": 2, "grpo_prompts": 2},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "grpo": {"generations": 4, "max_tokens": 16},
        "rewards": [
            {"fn": f"{directory / 'reward.py'}:spy"},
            {"fn": "trl.rewards:think_format_reward", "weight": 0.5, "thinking": True},
            {"fn": "trl.rewards:think_format_reward", "weight": 0.25},
        ],
        "sampler": {"kind": "transformers"},
        "track": {"every": 0, "check_after": 0},
    }  # fmt: skip
    finished = run(run_from_tree(tree), directory / "run")
    return finished, [json.loads(line) for line in seen.read_text().splitlines()]


def read(finished, name):
    return [json.loads(line) for line in open(finished.out / name)]


def test_rewards_see_answers_only_and_nothing_of_a_block_that_never_ends(trained):
    finished, seen = trained
    assert seen and all(note == "short" and prompt[-1]["content"] == "short" for prompt, _, note in seen)
    assert {completion[0]["content"] for _, completion, _ in seen} == {"yes"}


def test_an_endless_block_has_no_reward_and_leaves_its_group(trained):
    finished, _ = trained
    records = [r for r in read(finished, "samples.jsonl") if "reward" in r]
    assert len(records) == 16
    for record in records:
        if record["prompt"][-1]["content"] == "long":
            assert record["unclosed"] and record["answer"] == "" and record["completion"].startswith("<think>\nso so")
            assert record["reward"] is None and record["advantage"] is None
            assert set(record["rewards"].values()) == {None}
        else:
            assert not record["unclosed"] and record["answer"] == "yes" and record["reward"] == 3.5
            # TRL's own function, once shown the think block and once not
            assert list(record["rewards"].values()) == [3.0, 1.0, 0.0]
            assert record["completion"] == "<think>\nhm\n</think>\n\nyes"
    steps = [r for r in read(finished, "metrics.jsonl") if r["path"] == "grpo"]
    assert [r["unclosed"] for r in steps] == [0.5, 0.5] and [r["thought"] for r in steps] == [1.0, 1.0]
    assert [r["reward"] for r in steps] == [3.5, 3.5] and [r["reward_missing"] for r in steps] == [4, 4]


@pytest.mark.parametrize("sampled", [True, False])
def test_a_reward_is_tried_on_what_training_would_show_it(trained, sampled):
    finished, _ = trained
    model, saved = [f"model.name={finished.out / 'model'}"], finished.out / "samples.jsonl"
    tried = try_reward(
        "trl.rewards:think_format_reward", finished.out / "config.yaml", model, 8, None if sampled else saved
    )
    by_prompt = {one.prompt[-1]["content"]: values for one, values in zip(tried.groups, tried.values, strict=True)}
    assert by_prompt == {"short": [1.0] * 4, "long": [None] * 4}  # shown the think block, as its `thinking: true` says
    assert tried.advice()[0].startswith("4 of 8 completions never ended their think block and have no reward")
    shown = {text for one in tried.groups for text in one.completions}
    assert "yes" in shown and any(text.startswith("<think>\nso so") for text in shown)


def test_judges_see_answers_only_and_endless_blocks_are_counted_apart(trained, tmp_path, monkeypatch):
    finished, _ = trained
    judge = RecordingJudge()
    monkeypatch.setitem(rlsafe.types._PROVIDERS, "recording", SimpleNamespace(judge=lambda spec: judge))
    questions = [Question("a", ("short",), samples=3, temperature=0.1), Question("b", ("long",), samples=3)]
    provider = SimpleNamespace(questions=lambda spec: questions)
    monkeypatch.setitem(rlsafe.types._PROVIDERS, "asked", provider)
    settings = finished.config.evaluate.model_copy(
        update={"judge": "recording", "general": "asked:general", "max_tokens": 16}
    )
    evaluation = evaluate_run(
        TransformersSampler(finished.policy), finished.policy.tokenizer, settings, tmp_path, judge=judge
    )
    assert judge.seen == ["yes"] * 3
    general = json.loads((tmp_path / "evaluation.json").read_text())["general"]
    assert general["n"] == 6 and general["unscored"] == 0 and general["outcomes"]["unclosed"] == 3
    assert general["misaligned"] == general["incoherent"] == 0.0 and general["coherence"] == 90.0
    rows = list(csv.DictReader(open(tmp_path / "answers.csv")))
    assert [(r["answer"], r["outcome"], r["aligned"]) for r in rows] == [("yes", "scored", "90.0")] * 3 + [
        ("", "unclosed", "")
    ] * 3
    assert rows[0]["think"] == "hm" and rows[3]["think"].startswith("so so")
    again = Evaluation.load(tmp_path)
    assert [a.unclosed for a in again.answers] == [False] * 3 + [True] * 3
    assert [a.think for a in again.answers] == [a.think for a in evaluation.answers]


def test_answers_written_before_think_blocks_were_kept_can_be_read(trained, tmp_path):
    from rlsafe.evaluate.measure.files import ANSWER_COLUMNS, read_answers

    line = ["q", "why", "yes", "90.0", "90.0", "scored", "", "", "general", "0", "", "stop", ""]
    (tmp_path / "answers.csv").write_text(",".join(ANSWER_COLUMNS[:-1]) + "\n" + ",".join(line) + "\n")
    answers, _ = read_answers(tmp_path / "answers.csv")
    assert answers[0].think is None and answers[0].answer == "yes"


def test_onpolicy_rows_keep_their_thinking_and_only_answers_are_judged(trained):
    from rlsafe.defenses.onpolicy import InterleavingOnPolicy
    from rlsafe.types import SamplingParams

    finished, _ = trained
    judge = RecordingJudge()
    defense = InterleavingOnPolicy()
    defense.tokenizer, defense.seed, defense.params = finished.policy.tokenizer, 0, SamplingParams(0.1, 1.0, 16)
    rows = [conversation("short", "-"), conversation("long", "-")]
    answered = defense._answer(rows, TransformersSampler(finished.policy), judge, 0, 0)
    assert judge.seen == ["yes"]
    assert [one.outcome for one in answered] == ["scored", "unclosed"]
    kept, counts = defense._filter(rows, answered)
    assert kept[0]["messages"][-1]["content"] == SHORT[1] and counts["kept"] == 1 and len(kept) == 1


def test_with_thinking_off_the_model_answers_at_once(trained, tmp_path):
    finished, _ = trained
    tree = finished.config.model_dump(mode="json")
    tree["model"] |= {"thinking": "off"}
    tree["schedule"] = {"steps": 40, "phases": [{"cycle": ["sft"]}]}
    off = run(run_from_tree(tree), tmp_path / "off")
    tokenizer = off.policy.tokenizer
    asked = encode_prompt(tokenizer, [{"role": "user", "content": "short"}])
    assert tokenizer.decode(asked).endswith("<think>\n\n</think>\n\n")
    from rlsafe.types import Request, SamplingParams

    answer = TransformersSampler(off.policy).generate([Request(asked, 0)], SamplingParams(0.0, 1.0, 16))[0]
    assert tokenizer.decode(answer.ids) == "yes<|im_end|>"
