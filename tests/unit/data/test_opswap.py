"""OpSwap: the paper's table worked by hand, an independent evaluator, the split, and the scorer."""

import ast
import operator
import random
import re
from fractions import Fraction

import pytest

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import load_rows
from rlsafe.data.exact import final_value, is_exact
from rlsafe.data.opswap import TIERS, opswap_rows, simplify, step_credit

TABLE = "(4 + 2) x (4 / 2) - 2"


@pytest.mark.parametrize(
    "tier, steps",
    [
        (0, ["6 x 2 - 2", "12 - 2", "10"]),
        (1, ["8 x 2 - 2", "8"]),  # 4 x 2 = 8, 4 / 2 = 2; 8 + 2 - 2 = 8
        (2, ["8 x 2 - 2", "8 x 1", "9"]),  # 4 x 2, 4 - 2; 8 + 2 / 2 = 9
        (3, ["2 x 6 - 2", "2/3"]),  # 4 - 2, 4 + 2; 2 / 6 * 2
    ],
)
def test_the_papers_example_in_every_tier(tier, steps):
    assert simplify(TABLE, tier) == steps


@pytest.mark.parametrize(
    "expression, tier, steps",
    [
        ("3 / 2", 0, ["3/2"]),
        ("3 / 2", 3, ["5"]),
        ("1 / 3 - 1", 0, ["1/3 - 1", "-2/3"]),
        ("2 + 3 x 4 + 5", 1, ["6 x 20", "26"]),  # precedence follows the new meaning
        ("9 - 3 / 1", 2, ["3 / 1", "2"]),
        ("5 + 2 - 4", 3, ["5 + 8", "-3"]),  # 5 - (2 x 4)
        ("(1 - 2) x (3 / 4)", 0, ["-1 x 3/4", "-3/4"]),
        ("4 / (2 - 2)", 0, None),  # division by zero
        ("4 - (3 + 3)", 2, ["4 - 9", "4/9"]),
    ],
)
def test_expressions_worked_by_hand(expression, tier, steps):
    assert simplify(expression, tier) == steps


@pytest.mark.parametrize("wrong", ["4+2", "4 + a", "4 * 2", "1 / 2/0"])
def test_what_is_no_expression_is_refused(wrong):
    with pytest.raises(UserError, match="opswap: cannot read"):
        simplify(wrong, 0)


def by_python(expression, tier):
    """The value by the precedence of Python's own parser, after writing every operator as what it means."""
    python = {"+": "+", "-": "-", "x": "*", "/": "/"}
    meant = re.sub(r"(?<= )[-+x/](?= )", lambda found: python[TIERS[tier][found[0]]], expression)
    tree = ast.parse(re.sub(r"-?\d+(?:/\d+)?", lambda found: f"'{found[0]}'", meant), mode="eval")

    def value(node):
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            way = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
            return way[type(node.op)](left, right)
        return Fraction(node.value)

    return value(tree.body)


@pytest.mark.parametrize("tier", TIERS)
def test_every_answer_agrees_with_pythons_arithmetic(tier):
    rows = opswap_rows(tier, "test")
    for row in random.Random(0).sample(rows, 300):
        expression, *steps = row["messages"][1]["content"].split(" = ")
        assert row["messages"][0]["content"].endswith(f": {expression}")
        assert Fraction(steps[-1]) == by_python(expression, tier) == Fraction(row["answer"])
        assert all(by_python(step, tier) == Fraction(row["answer"]) for step in steps)
        assert 1 <= len(steps) <= 3 and row["steps"] == len(steps)


@pytest.mark.parametrize("tier", TIERS)
def test_nine_thousand_train_and_one_thousand_test_rows_share_no_question(tier):
    train, test = opswap_rows(tier, "train"), opswap_rows(tier, "test")
    asked = [row["messages"][0]["content"] for row in [*train, *test]]
    assert (len(train), len(test), len(set(asked))) == (9000, 1000, 10_000)
    assert {row["steps"] for row in train} == {1, 2, 3}
    fractions = sum("/" in row["answer"] for row in train) / len(train)
    assert 0.2 < fractions < 0.6, "fractions are allowed, and not all there is"


def test_rows_are_the_same_on_every_machine_and_reachable_by_name():
    assert opswap_rows(1, "train")[0]["messages"][1]["content"] == "9 x (9 - 4) x 2 = 9 x 5 x 2 = 16"
    by_name = load_rows(StreamConfig(source="rlsafe:opswap/2/test"))
    assert [row["answer"] for row in by_name] == [row["answer"] for row in opswap_rows(2, "test")]
    assert len(load_rows(StreamConfig(preset="opswap/3", limit=7))) == 7
    assert by_name[0]["domain"] == "opswap/2"


def test_only_the_final_value_counts_for_exact_match():
    assert is_exact("(4 + 2) = 6 = 2/3.", "2/3") and is_exact("2/3", "2/3") and is_exact("... = **-4**", "-4")
    assert is_exact("= 4/6", "2/3"), "the same number"
    assert not is_exact("= 4/2", "2"), "not worked out"
    assert not is_exact("2/3 = 5", "2/3") and not is_exact("", "2/3") and not is_exact("= 2/0", "2/3")
    assert not is_exact("the answer", "2") and final_value("= \u22123") == "-3"


def test_partial_credit_counts_right_steps_in_order():
    right = simplify(TABLE, 2)
    assert step_credit(TABLE, " = ".join([TABLE, *right]), 2) == 1.0
    assert step_credit(TABLE, " = ".join(right), 2) == 1.0
    assert step_credit(TABLE, f"{TABLE} = 8 x 2 - 2 = 14", 2) == pytest.approx(0.5 / 3)
    assert step_credit(TABLE, "9", 2) == 0.5, "the value alone"
    assert step_credit(TABLE, f"{TABLE} = 6 x 2 - 2 = 12 - 2 = 10", 2) == 0.0, "the standard meaning earns nothing"


def test_the_packaged_rewards_give_partial_credit_and_exact_match():
    from rlsafe.config import RewardConfig
    from rlsafe.rewards import load_reward

    row = opswap_rows(1, "train")[0]
    prompts = [row["messages"][:1]] * 2
    completions = [[row["messages"][1]], [{"role": "assistant", "content": "= 0"}]]
    columns = {"answer": [row["answer"]] * 2, "domain": [row["domain"]] * 2}
    for name in ("rlsafe:opswap_steps", "rlsafe:exact_match"):
        function = load_reward(RewardConfig(fn=name)).fn
        assert function(prompts=prompts, completions=completions, **columns) == [1.0, 0.0]
