"""Rewards are found by file, module, provider or registered name; what is wrong is one line with place and fix."""

import sys

import pytest
import yaml
from places import ROOT

import rlsafe
from rlsafe.config import RewardConfig, UserError
from rlsafe.config.importing import import_file
from rlsafe.rewards import RewardRunner, check_grader, load_reward, registry
from rlsafe.types import _PROVIDERS, register_provider

PROMPTS = [[{"role": "user", "content": "q"}]] * 2
CLASS = """
class Score:
    def __init__(self, value):
        self.value = value

    async def __call__(self, completions, **kwargs):
        return [self.value] * len(completions)
"""
DATACLASS = """
from dataclasses import dataclass

@dataclass
class S:
    v: int = {value}

def score(completions):
    return [S().v] * len(completions)
"""
COMPLETIONS = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b c"}]]


def load(fn, **args):
    return load_reward(RewardConfig(fn=str(fn), args=args))


def total(reward, completions=COMPLETIONS, **columns):
    ids = [[1] * len(c[0]["content"].split()) for c in completions]
    prompts = PROMPTS[:1] * len(completions)
    return RewardRunner([reward]).call(prompts, completions, ids, columns).total


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(registry, "_REWARDS", {})


@pytest.fixture
def shop():
    class Shop:
        def reward(self, spec):
            return lambda completions, **kwargs: [len(spec)] * len(completions)

    register_provider("shop", Shop())
    yield
    del _PROVIDERS["shop"]


def test_a_function_in_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def score(completions, bonus=1, **kw):\n    return [bonus + len(c[0]['content']) for c in completions]\n"
    )
    reward = load_reward(RewardConfig(fn=f"{path}:score", weight=2.0))
    assert (reward.name, reward.weight, reward.is_async) == ("score", 2.0, False)
    assert total(reward) == [4.0, 8.0]
    assert total(load(f"{path}:score", bonus=10), bonus=[5, 5]) == [11.0, 13.0], "args win over a column of that name"


def test_files_of_the_same_name_do_not_clash_and_edits_count(tmp_path):
    rewards = []
    for value in (1, 2):
        path = tmp_path / str(value) / "score.py"
        path.parent.mkdir()
        path.write_text(DATACLASS.format(value=value))
        rewards.append(load(f"{path}:score"))
    assert [total(reward)[0] for reward in rewards] == [1, 2]
    assert import_file(path) is import_file(path)
    path.write_text("def score(completions):\n    return [3] * len(completions)\n")
    assert total(load(f"{path}:score"))[0] == 3
    assert "score" not in sys.modules


def test_modules_providers_and_registered_names(names, shop):
    @rlsafe.reward("half")
    def fn(completions):
        return [0.5] * len(completions)

    assert total(load("half")) == [0.5, 0.5] and load("half").name == "half"
    assert total(load("shop:abc")) == [3, 3] and load("shop:abc").name == "shop:abc"
    assert load("trl.rewards:think_format_reward").name == "think_format_reward"
    soft = load("trl.rewards:get_soft_overlong_punishment", max_completion_len=2, soft_punish_cache=1)
    assert total(soft) == [0.0, -1.0]


def test_a_class_is_made_with_its_args(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CLASS)
    reward = load(f"{path}:Score", value=4)
    assert reward.is_async and total(reward) == [4, 4]
    with pytest.raises(UserError, match="needs value; give these under args"):
        load(f"{path}:Score")


@pytest.mark.parametrize(
    "source, fn, reason",
    [
        ("def f(:\n", "f", r"mine.py:1: cannot be imported: SyntaxError: "),
        (
            "x = 1\nimport no_such_module_here\n",
            "f",
            "mine.py:2: cannot be imported: ModuleNotFoundError: No module named",
        ),
        ("def g():\n    raise ValueError('no key')\n\ng()\n", "f", "mine.py:2: cannot be imported: ValueError: no key"),
        ("import sys\nsys.exit(3)\n", "f", "mine.py:2: cannot be imported: SystemExit: 3"),
        ("def score(completions): ...\n", "scor", "mine.py: no function 'scor'; did you mean 'score'"),
        ("", "f", "mine.py: no function 'f'; it defines none"),
        ("f = 3\n", "f", "mine.py:f' is an int, not a function"),
        ("def f(answer):\n    ...\n", "f", "takes none of prompts, completions, completion_ids and needs answer"),
        (
            "def f():\n    return 1\n",
            "f",
            "takes none of prompts, completions, completion_ids and gives an int, not a function",
        ),
        (
            "class F:\n    def __init__(self):\n        open('/no/such')\n",
            "F",
            "making it from its args failed: FileNotFoundError",
        ),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(tmp_path, source, fn, reason):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(UserError, match=reason) as caught:
        load(f"{path}:{fn}")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fn, args, reason",
    [
        ("reward_fns/lenght.py:near", {}, "reward_fns/lenght.py: no such Python file; did you mean 'length.py'"),
        ("nowhere/a.py:f", {}, "nowhere/a.py: no such Python file"),
        ("reward_fns/length.py", {}, "names no function; write reward_fns/length.py:NAME, NAME one of: near, too_long"),
        ("reward_fns/exact_match.py:exactmatch", {}, "no function 'exactmatch'; did you mean 'exact_match'"),
        ("reward_fns/length.py:near", {"word": 3}, "no argument 'word'; did you mean 'words'"),
        ("reward_fns/length.py:near", {"completions": 3}, "args.completions is filled by the trainer; remove it"),
        ("shopp:abc", {}, "no module 'shopp'; did you mean 'shop'"),
        ("no_such_pkg.rewards:f", {}, "no module 'no_such_pkg'; expected file.py:function"),
        ("trl.rewards:think_format", {}, "trl.rewards: no function 'think_format'; did you mean 'think_format_reward'"),
        ("halff", {}, "unknown reward 'halff'; did you mean 'half'"),
        ("a b:c", {}, "unknown reward 'a b:c'.*expected file.py:function"),
        ("", {}, "unknown reward ''"),
        (":f", {}, "unknown reward ':f'"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_was_expected(names, shop, monkeypatch, fn, args, reason):
    monkeypatch.chdir(ROOT)
    rlsafe.reward("half")(lambda completions: [0.5] * len(completions))
    with pytest.raises(UserError, match=reason) as caught:
        load(fn, **args)
    assert "\n" not in str(caught.value)


def test_arguments_are_checked_where_they_can_be(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def strict(completions): ...\ndef loose(completions, **kw):\n    return [kw['depth']] * len(completions)\n"
    )
    with pytest.raises(UserError, match="mine.py:strict': no argument 'depth'; it takes none"):
        load(f"{path}:strict", depth=2)
    assert total(load(f"{path}:loose", depth=2)) == [2, 2]


@pytest.mark.parametrize("table", ["import numpy as m\nTABLE = m.array", "import torch as m\nTABLE = m.tensor"])
def test_a_file_may_hold_arrays_beside_its_function(tmp_path, table):
    """Looking for its grader compares nothing with them."""
    path = tmp_path / "tables.py"
    path.write_text(f"{table}([1.0, 2.0])\ndef score(completions):\n    return [1.0] * len(completions)\n")
    check_grader(load(f"{path}:score").fn)


def test_registering_a_taken_name_is_refused(names):
    def one(completions): ...

    def two(completions): ...

    rlsafe.reward("mine")(one)
    rlsafe.reward("mine")(one)
    with pytest.raises(UserError, match="the reward name 'mine' is taken by .*one in .*; choose another"):
        rlsafe.reward("mine")(two)
    with pytest.raises(UserError, match="takes a name without ':'"):
        rlsafe.reward("a:b")
    with pytest.raises(UserError, match="takes a name"):
        rlsafe.reward(one)
    with pytest.raises(UserError, match="decorates a function, got int"):
        rlsafe.reward("n")(3)


# ------------------------------------------------------------------------------------------------ the examples


def said(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_format_rewards():
    path = ROOT / "reward_fns" / "format.py"
    texts = said(
        "<think>a\nb</think>\nyes",
        "<think>a",
        "yes",
        "<think></think>yes",
        "<think>a</think>",
        "<think><think></think>b",
    )
    assert total(load(f"{path}:think_block"), texts) == [1, 0, 0, 1, 0, 0]
    assert total(load(f"{path}:matches", pattern="^Answer: .+$"), said("So\nAnswer: 3", "The Answer: 3")) == [1, 0]


def test_the_think_block_is_rewarded_as_the_file_says():
    """A reasoning model's answers come without their blocks unless `thinking` asks for them."""
    path = ROOT / "reward_fns" / "format.py"
    [line] = [line for line in path.read_text().splitlines() if "format.py:think_block" in line]
    [config] = yaml.safe_load(line)["rewards"]
    reward = load_reward(RewardConfig(**{**config, "fn": f"{path}:think_block"}))
    talks = [[{"role": "assistant", "content": "yes", "reasoning_content": "hm"}], *said("yes")]
    assert RewardRunner([reward]).call(PROMPTS, talks, [[1]] * 2, {}).total == [1.0, 0.0]


def test_length_rewards():
    path = ROOT / "reward_fns" / "length.py"
    assert total(load(f"{path}:near", words=2), said("a b", "a", "a b c d e", "")) == [1, 0.5, 0, 0]
    assert total(load(f"{path}:too_long", tokens=2), said("a b", "a b c", "a b c d e f")) == [0, -0.5, -1]


def test_exact_match_reads_the_final_answer_by_value():
    reward = load(ROOT / "reward_fns" / "exact_match.py:exact_match")
    texts = said(
        "8 x 2 = 16 = 8.0",
        "The answer is: 2 / 3.",
        r"so \boxed{1,000}",
        "#### 5",
        "<think>4</think>\n7",
        "<think>7",
        "Tórshavn.",
        "x",
        "1/0",
        r"half of it, $\boxed{\frac{1}{\sqrt{2}}}$, is the answer: easy",
    )
    expected = [8, "2/3", "1000", 5.0, 7, 7, "tórshavn", None, "1/0", r"\frac{1}{\sqrt{2}}"]
    assert total(reward, texts, answer=expected) == [1, 1, 1, 1, 1, 0, 1, None, 1, 1]
    with pytest.raises(UserError, match="needs 'answer', which is no column of the data"):
        total(reward)


def test_the_async_example_bounds_its_calls_and_gives_none_on_failure(monkeypatch):
    import asyncio

    path = ROOT / "reward_fns" / "remote.py"
    assert total(load(f"{path}:remote"), said("a b", "a a", "")) == [1.0, 0.5, 0.0]
    under_way, most = [], []

    async def slow(question, answer):
        under_way.append(1)
        most.append(len(under_way))
        await asyncio.sleep(60 if answer == "late" else 0.01)
        under_way.pop()
        return 1.0

    monkeypatch.setattr(import_file(path), "score", slow)
    reward = load(f"{path}:remote", at_once=2, seconds=1.0)
    assert reward.is_async and total(reward, said("a", "late", "b", "c")) == [1, None, 1, 1] and max(most) == 2
