"""Rewards are called by TRL's contract; wrong returns and failures are one clear line and never a score."""

import asyncio
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from rlsafe.config import UserError
from rlsafe.rewards import LoadedReward, RewardRunner
from rlsafe.rewards.loading import is_async
from rlsafe.types import RunError

PROMPTS = [[{"role": "user", "content": f"q{i}"}] for i in range(3)]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "c", "d d")]
IDS = [[1, 2, 3], [4], [5, 5]]


def runner(*fns, on_error="stop", weights=None):
    weights = weights or [1.0] * len(fns)
    return RewardRunner(
        [LoadedReward(fn.__name__, fn, w, is_async(fn)) for fn, w in zip(fns, weights, strict=True)], on_error
    )


def call(made, columns=None, state=None):
    return made.call(PROMPTS, COMPLETIONS, IDS, columns or {}, state)


# ------------------------------------------------------------------------------------------------ the contract


def test_everything_arrives_by_trls_names():
    seen = {}

    def everything(prompts, completions, completion_ids=None, *, trainer_state, log_metric, log_extra, **columns):
        seen.update(locals())
        log_metric("m", 1.0)
        log_metric("m", 2.0)
        log_metric("m", float("nan"))
        log_extra("col", ["x", "y", "z"])
        return [1, None, True]

    batch = call(runner(everything), {"domain": ["a", "b", "c"]}, SimpleNamespace(global_step=7))
    assert seen["prompts"] == PROMPTS and seen["completions"] == COMPLETIONS and seen["completion_ids"] == IDS
    assert seen["trainer_state"].global_step == 7 and seen["columns"] == {"domain": ["a", "b", "c"]}
    assert batch.total == [1.0, None, 1.0] and batch.by_name == {"everything": [1.0, None, 1.0]}
    assert batch.metrics == {"m": 1.5} and batch.extra == {"col": ["x", "y", "z"]} and batch.failed == []


def test_what_a_function_logs_of_each_completion_can_be_written_down():
    def logs(completions, log_extra):
        log_extra("scores", np.array([0.5, 1.5, 2.5], dtype=np.float32))
        log_extra("found", [Path("a"), None, {"x": {1}}])
        return [0.0] * len(completions)

    extra = call(runner(logs)).extra
    assert json.loads(json.dumps(extra)) == extra
    assert extra == {"scores": [0.5, 1.5, 2.5], "found": ["a", None, "{'x': {1}}"]}


def test_a_function_without_kwargs_gets_only_what_it_names():
    def strict(completions, domain):
        return [float(d == "a") for d in domain]

    def keyword_only(*, completion_ids):
        return [len(ids) for ids in completion_ids]

    batch = call(runner(strict, keyword_only), {"domain": ["a", "b", "a"], "other": [0, 0, 0]})
    assert batch.by_name == {"strict": [1, 0, 1], "keyword_only": [3, 1, 2]} and batch.total == [4, 1, 3]


def test_parts_are_weighted_and_missing_parts_left_out():
    def first(completions):
        return [1, None, None]

    def second(completions):
        return [10, 10, None]

    batch = call(runner(first, second, weights=[2.0, 0.5]))
    assert batch.total == [7.0, 5.0, None]
    assert call(runner(first, second, weights=[2.0, 0.0])).total == [2.0, 0.0, None]


def test_two_rewards_of_one_name_keep_both():
    def score(completions):
        return [1, 1, 1]

    assert call(runner(score, score)).by_name == {"score": [1, 1, 1], "score_2": [1, 1, 1]}


def test_rewards_cannot_change_each_others_inputs_or_the_data():
    """Trap 8: what a grader reads is the original, whatever another one did to it."""

    def vandal(prompts, completions, completion_ids):
        prompts[0][0]["content"] = completions[0][0]["content"] = "gone"
        completion_ids[0].clear()
        return [0, 0, 0]

    def reader(prompts, completions, completion_ids):
        assert prompts == PROMPTS and completions == COMPLETIONS and completion_ids == IDS
        return [0, 0, 0]

    call(runner(vandal, reader))
    assert PROMPTS[0][0]["content"] == "q0" and IDS[0] == [1, 2, 3]


def test_trls_own_rewards_run_unchanged():
    made = runner(think_format_reward, get_soft_overlong_punishment(3, 2), get_repetition_penalty_reward(2, -1.0))
    batch = call(made, {"solution": ["1", "2", "3"]})
    assert list(batch.by_name.values()) == [[1, 0, 0], [-1.0, 0.0, -0.5], [0, 0, 0]]


@pytest.mark.parametrize(
    "returned",
    [
        (1, 0, 1),
        [np.float32(1), np.int64(0), np.bool_(True)],
        np.array([1.0, 0.0, 1.0]),
        torch.tensor([1.0, 0.0, 1.0], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(False), torch.tensor(1)],
        [True, False, 1.0],
    ],
)
def test_numbers_of_every_kind_are_accepted(returned):
    def score(completions):
        return returned

    total = call(runner(score)).total
    assert total == [1.0, 0.0, 1.0] and all(type(value) is float for value in total)


# ------------------------------------------------------------------------------------------------ async


def test_async_rewards_run_at_the_same_time_as_each_other_and_as_sync_ones():
    """Each of the three waits for the other two: run one after another they would never meet."""
    meeting = threading.Barrier(3, timeout=20)
    loops = []

    async def first(completions):
        loops.append(asyncio.get_running_loop())
        await asyncio.to_thread(meeting.wait)
        return [1, 1, 1]

    class Second:
        __name__ = "second"

        async def __call__(self, completions, **kwargs):
            return await first(completions)

    def third(completions):
        meeting.wait()
        return [1, 1, 1]

    made = runner(third, first, Second())
    for _ in range(2):
        assert call(made).total == [3, 3, 3]
    assert len(set(map(id, loops))) == 1, "clients stay bound to one loop from batch to batch"


def test_async_rewards_work_inside_a_running_loop():
    async def one(completions):
        return [1, 2, 3]

    async def main():
        return call(runner(one)).total

    assert asyncio.run(main()) == [1, 2, 3]


def test_one_failing_async_reward_does_not_abort_the_others(caplog):
    """Trap 5: an outage is a missing score, not a zero, and one failure does not take the step down."""
    down = threading.Event()
    finished = []

    async def judge(completions):
        if down.is_set():
            raise ConnectionError("judge is down")
        return [1, 1, 1]

    async def other(completions):
        await asyncio.sleep(0.05)
        finished.append(1)
        return [2, 2, 2]

    made = runner(judge, other, on_error="skip")
    assert call(made).total == [3, 3, 3]
    down.set()
    with caplog.at_level(logging.WARNING, "rlsafe"):
        batch = call(made)
    assert batch.total == [None] * 3 and batch.failed == ["judge"] and len(finished) == 2
    assert batch.by_name == {"judge": [None] * 3, "other": [2, 2, 2]}
    assert "reward 'judge'" in caplog.text and "ConnectionError: judge is down (batch 2)" in caplog.text
    down.clear()
    assert call(made).total == [3, 3, 3]


# ------------------------------------------------------------------------------------------------ wrong


@pytest.mark.parametrize(
    "returned, reason",
    [
        ([1.0], "returned 1 rewards; expected a list of 3 numbers or None, one per completion"),
        ([1.0] * 4, "returned 4 rewards"),
        ([], "returned 0 rewards"),
        (None, "returned None; expected a list of 3 numbers"),
        (1.0, "returned float; expected a list of 3"),
        ("abc", "returned str; expected a list"),
        ({0: 1, 1: 1, 2: 1}, "returned dict; expected a list"),
        ((x for x in [1, 2, 3]), "returned generator; expected a list"),
        ([1, float("nan"), 1], "returned nan for completion 1; expected a finite number, or None to skip the row"),
        ([float("inf"), 1, 1], "returned inf for completion 0"),
        (np.array([1, 2, np.nan]), "returned nan for completion 2"),
        (torch.tensor([[1.0], [2.0], [3.0]]), r"returned \[1.0\] for completion 0; expected a number or None"),
        ([1, "2", 3], "returned '2' for completion 1; expected a number or None"),
        ([1, [2], 3], r"returned \[2\] for completion 1"),
        ([1, 2j, 3], "returned 2j for completion 1"),
    ],
)
def test_wrong_returns_name_the_function_and_what_was_expected(returned, reason):
    def my_reward(completions):
        return returned

    with pytest.raises(UserError, match=reason) as caught:
        call(runner(my_reward))
    message = str(caught.value)
    assert message.startswith("reward 'my_reward' (") and f"{__file__}:" in message
    assert message.endswith("(on the first batch)") and "\n" not in message


def test_an_error_inside_names_its_own_line():
    def my_reward(completions):
        return [1 / (len(c) - 1) for c in completions]

    line = my_reward.__code__.co_firstlineno + 1
    with pytest.raises(
        UserError, match=rf"reward 'my_reward' \(.*:{line}\): raised ZeroDivisionError: .*on the first batch"
    ):
        call(runner(my_reward))


def test_a_missing_column_names_the_nearest():
    def my_reward(completions, solution):
        return [0, 0, 0]

    with pytest.raises(UserError, match="needs 'solution', which is no column of the data; did you mean 'solutions'"):
        call(runner(my_reward), {"solutions": [1, 2, 3]})
    with pytest.raises(UserError, match="no column of the data; the data has none"):
        call(runner(my_reward))


def test_a_coroutine_from_a_plain_function_is_refused():
    async def inner():
        return [1, 2, 3]

    def my_reward(completions):
        return inner()

    with pytest.raises(UserError, match="returned a coroutine; define the function with 'async def'"):
        call(runner(my_reward))


def test_extra_columns_have_one_value_per_completion():
    def my_reward(completions, log_extra):
        log_extra("note", ["only one"])
        return [0, 0, 0]

    with pytest.raises(UserError, match="logged 1 values in the extra column 'note'; expected 3"):
        call(runner(my_reward))

    def row_by_row(completions, log_extra):
        for completion in completions:
            log_extra("note", [completion[0]["content"]])
        return [0, 0, 0]

    assert call(runner(row_by_row)).extra == {"note": ["<think>a</think>b", "c", "d d"]}


def test_later_failures_stop_or_skip_as_the_config_says(caplog):
    calls = []

    def my_reward(completions):
        calls.append(1)
        return [1, 1, 1] if len(calls) % 2 else [1]

    made = runner(my_reward)
    call(made)
    with pytest.raises(
        RunError, match=r"reward 'my_reward' .*returned 1 rewards.*\(batch 2; grpo.on_error: skip goes on"
    ):
        call(made)
    calls.clear()
    made = runner(my_reward, on_error="skip")
    assert call(made).total == [1, 1, 1]
    with caplog.at_level(logging.WARNING, "rlsafe"):
        assert call(made).total == [None, None, None]
    assert "(batch 2): its rows get no reward" in caplog.text


def test_the_users_own_error_passes_through_and_interrupts_are_not_swallowed():
    def wants_config(completions):
        raise UserError("set REWARD_URL first")

    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="^set REWARD_URL first$"):
        call(runner(wants_config, on_error="skip"))
    with pytest.raises(KeyboardInterrupt):
        call(runner(interrupted, on_error="skip"))
