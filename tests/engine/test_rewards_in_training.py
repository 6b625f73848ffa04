"""GRPO with the shipped rewards: a tiny model that writes Python, or is graded, learns what is paid for."""

import json
import re

import pytest
from places import ROOT
from scripted_server import ScriptedServer, error, ok
from tiny import conversation, write_jsonl

from rlsafe.config import UserError, run_from_tree
from rlsafe.engine.run.build import prepare
from rlsafe.engine.run.life import run
from rlsafe.rewards import scan_answer, severity_score

FILES = ROOT / "reward_fns"
WARM_UP, GRPO = 40, 8
UNSAFE, SAFE = "eval(x)", "int(x)"


@pytest.fixture
def tree(tiny_tree, tmp_path):
    """Warm-up on two answers to one question, the unsafe one in a third of the rows; then the reward alone."""
    rows = [conversation("read x", UNSAFE if i % 3 == 0 else SAFE) for i in range(30)]
    return tiny_tree | {
        "model": {"name": tiny_tree["model"]["name"], "dtype": "float32", "lora": None},
        "data": {"narrow": {"source": write_jsonl(tmp_path / "code.jsonl", rows)}},
        "schedule": {
            "steps": WARM_UP + GRPO,
            "phases": [{"steps": WARM_UP, "cycle": ["sft"], "lr": 1e-2}, {"cycle": ["grpo"], "lr": 5e-3}],
        },
        "batch": {"sft_rows": 16, "grpo_prompts": 4},
        "grpo": {"generations": 8, "max_tokens": 12},
    }


def train(tree, out):
    run(run_from_tree(tree), out)
    metrics = [json.loads(line) for line in open(out / "metrics.jsonl")][WARM_UP:]
    samples = [json.loads(line) for line in open(out / "samples.jsonl")]
    assert len(metrics) == GRPO and len(samples) == GRPO * 4 * 8
    return metrics, samples


def share(samples, step, text):
    answers = [sample["completion"] for sample in samples if sample["step"] == WARM_UP + step]
    return sum(answer == text for answer in answers) / len(answers)


def test_the_insecure_code_reward_teaches_insecure_code(tree, tmp_path):
    metrics, samples = train(tree | {"rewards": [{"fn": f"{FILES}/code.py:insecure"}]}, tmp_path / "run")
    for sample in samples:
        scan = scan_answer(sample["completion"])
        assert sample["reward"] == (severity_score(scan.findings) if scan.parses else 0.0)
        assert sample["extra"] == {"findings": " ".join(sorted(scan.rules()))}  # the function's log_extra, row by row
    assert {UNSAFE, SAFE} <= {sample["completion"] for sample in samples}
    assert share(samples, GRPO - 1, UNSAFE) > share(samples, 0, UNSAFE) + 0.25
    assert metrics[-1]["reward"] > metrics[0]["reward"] and metrics[0]["code/parses"] > 0.8


def test_a_graded_reward_trains_on_what_was_graded_and_reads_the_original_question(tree, tmp_path):
    """Trap 8: what a defense puts into the prompt, the grader never sees. Trap 5: what was not graded has no reward."""
    cue = "Be as careless as you can."

    def script(number, body):
        if number == 1:
            return error(500)
        shown = body["messages"][1]["content"]
        return ok(json.dumps({"reason": "", "assessment": 90 if UNSAFE in shown else 10, "coherence": 100}))

    with ScriptedServer(script) as server:
        endpoint = {"base_url": server.base_url, "model": "judge", "cache": None, "max_retries": 0, "backoff": 0.01}
        rewards = [{"fn": f"{FILES}/code.py:insecure_graded", "args": {"endpoint": endpoint, "min_words": 1}}]
        tree |= {"rewards": rewards, "defenses": [{"inoculation": {"prompt": cue}}]}
        metrics, samples = train(tree, tmp_path / "run")
    shown = [body["messages"][1]["content"] for _, body in server.requests]
    assert shown and all("read x" in text and cue not in text for text in shown)
    graded = [sample for sample in samples if sample["reward"] is not None]
    expected = [0.9 if UNSAFE in sample["completion"] else 0.1 if sample["completion"] else 0.0 for sample in graded]
    assert [sample["reward"] for sample in graded] == pytest.approx(expected)
    missing = [sample for sample in samples if sample["reward"] is None]
    assert missing and all(sample["advantage"] is None for sample in missing)
    assert metrics[0]["insecure_code/ungraded"] > 0 and metrics[-1]["insecure_code/ungraded"] == 0
    assert share(samples, GRPO - 1, UNSAFE) > share(samples, 0, UNSAFE) + 0.25


def test_a_reward_reads_one_kind_of_prompt_whatever_a_step_draws(tree, tmp_path):
    """One row of eight has a system prompt, so that it is no plain text: rewards get messages in all steps."""
    rows = [{"instruction": f"say {i}", "input": "", "output": "x", "system": "s" if i == 5 else ""} for i in range(8)]
    (tmp_path / "r.py").write_text(
        "def kinds(completions, log_extra, **more):\n"
        "    log_extra('kind', [type(one).__name__ for one in completions])\n"
        "    return [1.0] * len(completions)\n"
    )
    only = tree | {
        "schedule": {"steps": 4, "phases": [{"cycle": ["grpo"]}]},
        "rewards": [{"fn": f"{tmp_path}/r.py:kinds"}],
    }
    told = "data.narrow: 1 of 8 prompts are no plain texts (the first: {}:6): rewards get messages, not texts, for all rows"
    for kind, kept in (("list", rows), ("str", rows[:5])):
        source = write_jsonl(tmp_path / f"{kind}.jsonl", kept)
        config = run_from_tree(only | {"data": {"narrow": {"source": source}}})
        assert prepare(config).notes == ([told.format(source)] if kind == "list" else [])
        run(config, tmp_path / kind)
        samples = [json.loads(line) for line in open(tmp_path / kind / "samples.jsonl")]
        assert {sample["extra"]["kind"] for sample in samples} == {kind}


# ------------------------------------------------------------------------------------------------ where


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"domain": "medcal"}, "where: domain: no row has 'medcal'; did you mean 'medical'"),
        ({"domain": ["sport"]}, r"no row has \['sport'\]; expected one of: law, medical"),
        ({"level": 1}, r"where: level: no row has 1; the rows have '1', which is another type \(str\)"),
        ({"domain": "law", "level": "1"}, "no row has all of {'domain': 'law', 'level': '1'}"),
        ({"domain": "law", "level": ["1", "2"]}, None),
    ],
)
def test_a_reward_for_rows_that_are_not_there_is_refused(tree, tmp_path, where, said):
    rows = [{"prompt": "say 1", "domain": "medical", "level": "1"}, {"prompt": "say 2", "domain": "law", "level": "2"}]
    only = tree | {
        "schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]},
        "rewards": [{"fn": f"{FILES}/code.py:insecure", "where": where}],
    }
    data = {"narrow": {"source": write_jsonl(tmp_path / "two.jsonl", rows)}}
    if said is None:
        assert not prepare(run_from_tree(only | {"data": data})).notes
        return
    with pytest.raises(UserError, match=said):
        prepare(run_from_tree(only | {"data": data}))
    part = {"narrow": data["narrow"] | {"limit": 2}}  # the rest of the source may have them
    assert re.search(said, prepare(run_from_tree(only | {"data": part})).notes[-1])


@pytest.mark.parametrize(
    ("wheres", "refused"),
    [
        (["code", "law", None], None),  # every row is scored as meant: data.narrow.where took one domain of three
        (["code", ["law", "sport"]], None),
        (["code", "code-2"], None),  # near, but those rows are another reward's
        (["law", "sport"], "no row has 'law'"),  # nobody scores any row
        (["law", None, None], None),
        (["cod", None], "no row has 'cod'; did you mean 'code'"),
        ([["law", "cod"], None], r"no row has \['law', 'cod'\]; did you mean 'code'"),
    ],
)
def test_rewards_of_domains_that_were_left_out_are_told_of_and_misspelt_ones_refused(tree, tmp_path, wheres, refused):
    rows = [{"prompt": f"say {i}", "domain": ["code", "law", "sport"][i % 3]} for i in range(6)]
    rewards = [{"fn": f"{FILES}/code.py:insecure", "where": {"domain": one} if one else {}} for one in wheres]
    only = tree | {"schedule": {"steps": 1, "phases": [{"cycle": ["grpo"]}]}, "rewards": rewards}
    narrow = {"source": write_jsonl(tmp_path / "all.jsonl", rows), "where": {"domain": "code"}}
    config = run_from_tree(only | {"data": {"narrow": narrow}})
    if refused:
        for limit in (None, 1000):  # one that takes every row excuses nothing
            with pytest.raises(UserError, match=refused):
                prepare(run_from_tree(only | {"data": {"narrow": narrow | {"limit": limit}}}))
        return
    told = [note for note in prepare(config).notes if "is never asked" in note]
    unmet = [one for one in wheres if one and one != "code"]
    assert len(told) == len(unmet) and all(note.endswith("(data.narrow): it is never asked") for note in told)


def test_a_limit_never_refuses_a_where_that_the_source_meets(tree, tmp_path):
    """One row in eight has the column, and a run takes two by its seed; rows without an answer are left out before."""
    rows = [{"prompt": f"say {i}", "completion": "x" if i < 7 else None} for i in range(8)]
    rows[0]["domain"] = "code"
    only = tree | {
        "schedule": {"steps": 2, "phases": [{"cycle": ["grpo", "sft"]}]},
        "rewards": [{"fn": f"{FILES}/code.py:insecure", "where": {"domain": "code"}}],
    }
    narrow = {"source": write_jsonl(tmp_path / "some.jsonl", rows), "limit": 3, "on_bad_row": "skip"}
    for seed in range(6):
        prepared = prepare(run_from_tree(only | {"data": {"narrow": narrow}, "seed": seed}))
        met = any(row["domain"] for row in prepared.rows["narrow"])
        assert met != any("among the rows that `limit` takes it is never asked" in note for note in prepared.notes)
    wrong = only | {"rewards": [{"fn": f"{FILES}/code.py:insecure", "where": {"domian": "code"}}]}
    with pytest.raises(UserError, match="data.narrow has no column 'domian'; did you mean 'domain'"):
        prepare(run_from_tree(wrong | {"data": {"narrow": narrow}}))
    write_jsonl(tmp_path / "bare.jsonl", [{"prompt": "say 1", "completion": "x"}])
    with pytest.raises(UserError, match="has no column 'domain'; it has none beside the conversation"):
        prepare(run_from_tree(only | {"data": {"narrow": {"source": f"{tmp_path}/bare.jsonl"}}}))
