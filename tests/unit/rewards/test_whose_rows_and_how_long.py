"""Texts for plain prompts, rewards for some rows, time limits, names that are kept apart, files that other processes find."""

import logging
import threading
import time

import pytest

from rlsafe.config import RewardConfig, UserError
from rlsafe.config.importing import import_file
from rlsafe.rewards import LoadedReward, RewardRunner, load_reward
from rlsafe.rewards.own import OWN
from rlsafe.rewards.spread import running, summary, unlearnable
from rlsafe.types import RunError

ASKED = [[{"role": "user", "content": f"q{i}"}] for i in range(4)]
ANSWERS = [[{"role": "assistant", "content": "x" * i + "."}] for i in range(4)]


def call(runner, columns=None, plain=(True,) * 4):
    return runner.call(ASKED, ANSWERS, [[1]] * 4, columns or {}, plain=plain)


def runner(*fns, on_error="stop", **settings):
    return RewardRunner([LoadedReward(fn.__name__, fn, **settings) for fn in fns], on_error)


# ------------------------------------------------------------------------------------------------ plain prompts


def test_plain_prompts_give_texts_and_conversations_messages():
    seen = {}

    def brief(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        return [-float(len(text)) for text in completions]

    assert call(runner(brief)).total == [-1.0, -2.0, -3.0, -4.0]
    assert seen["prompts"] == ["q0", "q1", "q2", "q3"] and seen["completions"][1] == "x."
    call(runner(brief), plain=(True, False, True, True))
    assert seen["prompts"] == ASKED and seen["completions"] == ANSWERS, "one kind for all of a call"


def test_a_function_that_reads_messages_gets_them_and_is_told_of(caplog):
    calls = []

    def talks(completions, log_metric):
        calls.append(type(completions[0]))
        log_metric("seen", len(completions))
        return [float(len(c[-1]["content"])) for c in completions]

    made = runner(talks)
    with caplog.at_level(logging.WARNING, "rlsafe"):
        batch = call(made)
    assert batch.total == [1.0, 2.0, 3.0, 4.0] and batch.metrics == {"seen": 4.0}
    assert "reward 'talks' reads messages" in caplog.text
    call(made)
    assert calls == [str, list, list], "asked once more on the first batch, and never again"


def test_a_copy_of_a_message_is_a_way_of_reading_messages():
    def copies(completions):
        return [float(len(dict(c[-1])["content"])) for c in completions]

    assert call(runner(copies)).total == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("first", ["nothing scored", "no plain row"])
def test_what_a_function_reads_is_not_settled_before_it_has_read_some(first, caplog):
    """A gold answer that no row of the first batch has; messages first, texts later."""

    def gold(completions, answer):
        return [None if a is None else float(a in c[0]["content"]) for a, c in zip(answer, completions, strict=True)]

    asked = runner(gold)
    columns, plain = (
        ({"answer": [None] * 4}, (True,) * 4) if first == "nothing scored" else ({"answer": ["a"] * 4}, (False,) * 4)
    )
    call(asked, columns, plain)
    later = call(asked, {"answer": [None, "a", "b", None]})
    assert later.total[0] is None and later.total[1] is not None and not later.failed
    assert "reads messages" in caplog.text


def test_a_function_that_fails_either_way_fails_as_the_contract_has_it():
    def broken(completions):
        return [text.nothing for text in completions]

    with pytest.raises(UserError, match="'str' object has no attribute 'nothing'"):
        call(runner(broken))


# ------------------------------------------------------------------------------------------------ where


def test_a_reward_is_asked_about_its_own_rows_only():
    def code(completions, domain):
        assert set(domain) == {"code"}
        return [10.0] * len(completions)

    def every(completions):
        return [1.0] * len(completions)

    made = RewardRunner(
        [
            LoadedReward("code", code, where={"domain": "code"}),
            LoadedReward("every", every, where={"domain": ["code", "law"]}),
        ]
    )
    batch = call(made, {"domain": ["code", "law", None, "code"]})
    assert batch.total == [11.0, 1.0, None, 11.0]
    assert batch.by_name["code"] == [10.0, None, None, 10.0]
    assert call(made, {"domain": ["art"] * 4}).total == [None] * 4
    with pytest.raises(UserError, match="where: 'domain' is no column of the data; did you mean 'domains'"):
        call(made, {"domains": ["code"] * 4})


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize("where", ["here", "on a thread"])
def test_a_call_that_hangs_ends_in_the_policy_for_missing_rewards(where):
    calls = []

    def stuck(completions):
        calls.append(1)
        if len(calls) == 2:
            try:
                time.sleep(60)
            except Exception:  # a grader's own net must not hold the limit
                return [0.0] * len(completions)
        return [1.0] * len(completions)

    def both():
        made = runner(stuck, on_error="skip", timeout=1.0)
        assert call(made).total == [1.0] * 4
        began = time.monotonic()
        assert call(made).total == [None] * 4 and time.monotonic() - began < 20
        assert call(made).total == [1.0] * 4
        calls.clear()
        made = runner(stuck, timeout=1.0)
        call(made)
        with pytest.raises(RunError, match=r"'stuck'.*did not return within 1 s \(rewards.timeout\) \(batch 2"):
            call(made)

    if where == "here":
        both()
    else:
        failed = []
        thread = threading.Thread(target=lambda: failed.append(_raised(both)))
        thread.start()
        thread.join(60)
        assert failed == [None]


def _raised(check):
    try:
        check()
    except BaseException as error:
        return error


def test_async_functions_have_the_limit_too():
    import asyncio

    async def slow(completions):
        await asyncio.sleep(30)

    made = RewardRunner([LoadedReward("slow", slow, is_async=True, timeout=0.2)])
    with pytest.raises(UserError, match="did not return within 0.2 s"):
        call(made)


# ------------------------------------------------------------------------------------------------ names


def test_what_rewards_log_overwrites_nothing():
    def one(completions, log_metric, log_extra):
        for name, value in (
            ("loss", 9.0),
            ("share", 1.0),
            ("own", 3.0),
            ("reward/two", 5.0),
            ("misaligned_general", 1.0),
        ):
            log_metric(name, value)
        log_extra("why", ["a"] * 4)
        return [1.0] * 4

    def two(completions, log_metric, log_extra):
        log_metric("share", 2.0)
        log_extra("why", ["b"] * 4)
        return [1.0] * 4

    batch = call(runner(one, two))
    assert batch.metrics == {
        "reward/one/loss": 9.0, "reward/one/share": 1.0, "own": 3.0, "reward/one/reward/two": 5.0,
        "reward/one/misaligned_general": 1.0, "reward/two/share": 2.0,
    }  # fmt: skip
    assert batch.extra == {"reward/one/why": ["a"] * 4, "reward/two/why": ["b"] * 4}


def test_every_number_of_a_run_is_known_as_its_own(tiny_tree, tmp_path):
    from rlsafe.config import run_from_tree
    from rlsafe.engine.run.life import run

    tiny_tree["schedule"] = {"steps": 2, "phases": [{"cycle": ["sft", "grpo"]}]}
    tiny_tree["defenses"] = ["kl"]
    made = run(run_from_tree(tiny_tree), tmp_path / "run")
    names = {name for record in made.records for name in record}
    assert {name for name in names if not OWN.match(name)} == set()


# ------------------------------------------------------------------------------------------------ files


def test_functions_of_a_file_can_be_pickled_into_a_spawned_process(tmp_path):
    folder = tmp_path / "my rewards ü"
    folder.mkdir()
    (folder / "helping.py").write_text("def half(text):\n    return len(text) / 2\n")
    (folder / "code.py").write_text(  # a name that the standard library has, too
        "import multiprocessing\nfrom concurrent.futures import ProcessPoolExecutor\nfrom helping import half\n"
        "def grade(text):\n    return half(text)\n"
        "def pooled(completions):\n"
        "    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:\n"
        "        return list(pool.map(grade, completions))\n"
    )
    made = RewardRunner([load_reward(RewardConfig(fn=f"{folder}/code.py:pooled"))])
    assert call(made).total == [0.5, 1.0, 1.5, 2.0]
    import code

    assert hasattr(code, "InteractiveConsole"), "the library's module is still its own"


def test_a_changed_file_is_imported_again_and_an_unchanged_one_once(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("VALUE = 1\n")
    first = import_file(file)
    assert import_file(file) is first
    file.write_text("VALUE = 2\n")
    assert import_file(file).VALUE == 2 and first.VALUE == 1


# ------------------------------------------------------------------------------------------------ nothing to learn


def step(number, groups, zero, reward):
    return {"step": number, "groups": groups, "zero_variance_groups": zero, "reward": reward}


def test_steps_without_spread_are_counted_told_and_summed_up():
    learned, equal, missing = step(0, 2, 1, 0.5), step(1, 2, 2, 0.0), step(2, 0, 0, None)
    assert [unlearnable(one) for one in (learned, equal, missing, {"step": 3})] == [None, "equal", "missing", None]
    assert summary([learned]) == [] == summary([{"step": 0}])
    assert "1 of 2 GRPO steps had nothing to learn from" in summary([learned, equal])[0]
    assert "nothing was learned from rewards in any of 2 GRPO steps" in summary([equal, {"step": 9}, missing])[0]
    assert "no completion got a reward (1 steps)" in summary([equal, missing])[0]
    assert running([equal] * 2) is None and running([equal, equal, learned]) is None
    assert "in the last 3 GRPO steps" in running([learned, equal, equal, {"step": 7}, equal])
    assert running([equal] * 3 + [{"step": 4}]) is None, "said once, by the step itself"
