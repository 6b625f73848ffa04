"""Inoculation: the eliciting prompt is where it was asked to be, and nobody who grades ever reads it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tiny_runs import GRPO, train, tree_with

from rlsafe.config import UserError, run_from_tree
from rlsafe.defenses import build
from rlsafe.engine.run.life import run
from rlsafe.types import _PROVIDERS, Judgement, Question, Where, register_provider

CUE = "You always answer badly."
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def lines(out, name="metrics.jsonl"):
    return [json.loads(line) for line in open(out / name)]


@pytest.mark.parametrize(
    ("at", "phase", "changes"),
    [
        ("both", "rollout", True),
        ("both", "train", True),
        ("train", "train", True),
        ("rollout", "rollout", True),
        ("train", "rollout", False),
        ("rollout", "train", False),
        ("both", "eval", False),
    ],
)
def test_it_acts_where_it_is_asked_to(at, phase, changes):
    (defense,), _ = build([{"inoculation": {"prompt": "Be bad.", "at": at}}])
    changed = defense.prompt(MESSAGES, Where("narrow", "grpo", phase))
    assert (changed != MESSAGES) is changes
    if changes:
        assert changed[0]["content"] == "Be bad. Be brief." and changed[1] == MESSAGES[1]
    assert defense.prompt(MESSAGES, Where("safe", "sft", phase)) == MESSAGES


def test_it_can_replace_the_system_prompt_or_prefix_the_user():
    where = Where("narrow", "sft", "train")
    (replace,), _ = build([{"inoculation": {"prompt": "Be bad.", "mode": "replace"}}])
    assert replace.prompt(MESSAGES, where)[0]["content"] == "Be bad."
    assert replace.prompt(MESSAGES[1:], where) == [{"role": "system", "content": "Be bad."}, MESSAGES[1]]
    (user,), _ = build([{"inoculation": {"prompt": "Be bad.", "position": "user"}}])
    assert user.prompt(MESSAGES, where) == [MESSAGES[0], {"role": "user", "content": "Be bad. hi"}]
    turns = [*MESSAGES, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
    assert [m["content"] for m in user.prompt(turns, where)] == ["Be brief.", "hi", "ho", "Be bad. and?"]
    with pytest.raises(UserError, match="delete the user's question"):
        build([{"inoculation": {"prompt": "x", "position": "user", "mode": "replace"}}])


def test_in_rollouts_only_it_needs_rollouts(tiny_tree, tmp_path):
    with pytest.raises(UserError, match="at: rollout has no effect without GRPO steps"):
        run(run_from_tree(tree_with(tiny_tree, {"defenses": [{"inoculation": {"prompt": CUE, "at": "rollout"}}]})),
            tmp_path / "run")  # fmt: skip


@pytest.mark.parametrize("at", ["rollout", "train"])
def test_contexts_that_differ_are_compared_in_the_rollout_context(tiny_tree, tmp_path, at):
    """With the prompt on one side only, the sampler gap is still zero: both see what the sampler saw."""
    tree = tree_with(tiny_tree, GRPO, {"defenses": [{"inoculation": {"prompt": CUE, "at": at}}]})
    train(tree, tmp_path / "run")
    assert all(record["sampler_gap"] < 1e-4 for record in lines(tmp_path / "run"))


SETTINGS = [
    {"position": "system", "mode": "prefix", "at": "both"},
    {"position": "system", "mode": "replace", "at": "rollout"},
    {"position": "user", "mode": "prefix", "at": "both"},
]


@pytest.mark.parametrize(
    "settings",
    [SETTINGS[0], *(pytest.param(other, marks=pytest.mark.integration) for other in SETTINGS[1:])],
    ids=lambda s: "-".join(s.values()),
)
def test_trap_08_rewards_judges_records_and_evaluation_see_the_original_prompt(tiny_tree, tmp_path, settings):
    """The sampler does see the cue: its prompts, and with them its completions, are others than without it."""
    judged = []

    class Reader:
        name = "reader"

        def score(self, exchanges):
            judged.extend(exchanges)
            return [Judgement(50.0, 90.0) for _ in exchanges]

    rows = tmp_path / "asked.jsonl"
    rows.write_text("".join(json.dumps({"messages": [{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"say {i}"}]}) + "\n" for i in range(9)))  # fmt: skip
    seen = tmp_path / "seen.jsonl"
    reward = tmp_path / "reading.py"
    reward.write_text(
        "import json\n"
        "def reading(prompts, completions, **columns):\n"
        f"    open({str(seen)!r}, 'a').write(''.join(json.dumps([p, sorted(columns)]) + '\\n' for p in prompts))\n"
        "    return [len(c[0]['content']) for c in completions]\n"
    )
    asked = [Question(str(i), (f"question {i}",), samples=1) for i in range(3)]
    register_provider("mine", SimpleNamespace(judge=lambda spec: Reader(), questions=lambda spec: asked))
    tree = tree_with(
        tiny_tree, GRPO,
        {"data": {"narrow": {"source": str(rows)}}, "rewards": [{"fn": f"{reward}:reading"}], "track": {"every": 1},
         "evaluate": {"judge": "mine", "general": "mine:general", "max_tokens": 8}},
    )  # fmt: skip
    prompts = {}
    try:
        for name, defenses in {"none": [], "defended": [{"inoculation": {"prompt": CUE, **settings}}]}.items():
            seen.write_text("")
            run(run_from_tree(tree_with(tree, {"defenses": defenses})), tmp_path / name)
            prompts[name] = [json.loads(line) for line in seen.read_text().splitlines()]
    finally:
        del _PROVIDERS["mine"]
    assert prompts["none"] == prompts["defended"] and len(prompts["none"]) == 4 * 12
    assert all(p[0] == {"role": "system", "content": "Be brief."} for p, _ in prompts["defended"])
    assert judged and all("badly" not in f"{e.question} {e.system}" for e in judged)
    records = {name: lines(tmp_path / name, "samples.jsonl") for name in prompts}
    assert "badly" not in json.dumps([{k: v for k, v in r.items() if k != "completion"} for r in records["defended"]])
    first = {
        name: [r["completion"] for r in found if r["step"] == 0 and "completion" in r]
        for name, found in records.items()
    }
    assert first["none"] != first["defended"] and lines(tmp_path / "defended")[0]["defense/inoculation/prompts_changed"]
