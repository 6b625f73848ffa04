"""Chat templates without a system role: who would add a system turn is named before anything runs, and a user's turn is offered."""

from pathlib import Path

import pytest
import trl
from tiny import byte_tokenizer

from rlsafe.config import EvaluateConfig, UserError
from rlsafe.data import encode_prompt
from rlsafe.data.rendered import additions
from rlsafe.defenses import build
from rlsafe.engine.run.templates import check_evaluation
from rlsafe.evaluate import Material
from rlsafe.evaluate.ask.asking import plan
from rlsafe.evaluate.ask.pairs import Pair
from rlsafe.evaluate.ask.system_turns import asked, placed
from rlsafe.evaluate.measure.benign import plan_rows
from rlsafe.types import Question, Where

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
DEAF = (
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}<assistant>"
)
BARE, WITH = Question("bare", ("why?",)), Question("with", ("why?", "how?"), system="be brief")
ROW = {"messages": [{"role": "system", "content": "add"}, {"role": "user", "content": "1 + 1"}], "_index": 7}
PAIR = Pair("q", "why?", "so.", "no.", "be brief")


def tokenizer(template=None):
    made = byte_tokenizer()
    made.bos_token = made.eos_token
    if template:
        made.chat_template = template if "{" in template else (TEMPLATES / f"{template}.jinja").read_text("utf-8")
    return made


def material(**more):
    return Material(
        **{"questions": {"general": [BARE]}, "sources": {}, "tasks": {}, "judge": None, "cue": None, **more}
    )


@pytest.mark.parametrize("template", ["gemma", DEAF], ids=["refuses", "leaves out"])
@pytest.mark.parametrize(
    ("more", "who"),
    [
        ({"cue": "be bad"}, "evaluate.cue: "),
        ({"questions": {"indomain": [BARE, WITH]}}, "evaluate.indomain: question 'with' has a system prompt: "),
        ({"pairs": {"style": [PAIR]}}, "evaluate.likelihood.style: question 'q' has a system prompt: "),
        ({"tasks": {"sums": [ROW]}}, "evaluate.benign: sums: row 7 has a system prompt: "),
    ],
)
def test_who_adds_a_system_turn_is_named_before_training(template, more, who):
    with pytest.raises(UserError, match="evaluate.position: user puts system prompts in front") as caught:
        check_evaluation(tokenizer(template), EvaluateConfig(), material(**more))
    assert str(caught.value).startswith(who)
    check_evaluation(tokenizer(template), EvaluateConfig(position="user"), material(**more))
    check_evaluation(tokenizer(), EvaluateConfig(), material(**more))


def test_what_is_not_asked_under_a_system_turn_is_no_error():
    """A cue is for the general questions alone."""
    check_evaluation(tokenizer("gemma"), EvaluateConfig(), material(cue="be bad", questions={"indomain": [BARE]}))
    check_evaluation(
        tokenizer("gemma"), EvaluateConfig(), material(tasks={"sums": [{"messages": ROW["messages"][1:]}]})
    )


@pytest.mark.parametrize("template", ["gemma", DEAF], ids=["refuses", "leaves out"])
def test_no_question_is_asked_without_its_system_prompt(template):
    """Whoever plans answers: an evaluation, a probe, `ask`, the extraction of a persona."""
    bad = tokenizer(template)
    with pytest.raises(UserError, match="^question 'with': .*; evaluate.position: user puts"):
        plan(bad, [BARE, WITH], seed=0)
    with pytest.raises(UserError, match="^question 'bare' under its cue: .*; position: user puts"):
        plan(bad, [BARE], seed=0, cue="be bad", setting="position")
    with pytest.raises(UserError, match="^benign task 'sums', row 7: "):
        plan_rows(bad, [ROW], "sums", seed=0, temperature=1.0)
    planned = plan(bad, [WITH], seed=0, samples=2, cue="be bad", position="user")
    text = [bad.decode(one.request.prompt_ids) for one in planned]
    assert "be bad\n\nbe brief why?" in text[0] and "be bad\n\nbe brief how?" in text[1]
    assert [(one.question, one.system, one.cue) for one in planned] == [
        (q, "be brief", "be bad") for q in ("why?", "how?")
    ]
    assert "add 1 + 1" in bad.decode(
        plan_rows(bad, [ROW], "sums", seed=0, temperature=1.0, position="user")[0].request.prompt_ids
    )


def test_a_cue_in_the_users_turn_is_what_inoculation_trained_under():
    defenses, _ = build([{"inoculation": {"prompt": "be bad", "position": "user"}}], [])
    trained = defenses[0].prompt([{"role": "user", "content": "why?"}], Where("narrow", "sft", "train"))
    assert asked("why?", "be bad", "user") == trained
    assert PAIR.conversations("user")[1] == [
        *asked("why?", "be brief", "user"),
        {"role": "assistant", "content": "no."},
    ]


def test_only_a_leading_system_turn_moves_and_the_other_position_changes_nothing():
    talk = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "u"},
    ]
    assert placed(talk, "user") == [talk[1], {"role": "user", "content": "s u"}]
    assert placed(talk, "system") == talk and placed(talk[1:], "user") == talk[1:]
    before, after = tokenizer(), tokenizer()
    assert plan(before, [WITH], seed=3)[0].request == plan(after, [WITH], seed=3, position="system")[0].request
    assert encode_prompt(before, asked("why?", "be brief")) == plan(before, [WITH], seed=3)[0].request.prompt_ids


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, []),
        ("gemma", []),
        ("qwen3", []),
        ("llama3", []),
        ("qwen2_5", ["of its own where a conversation has none: 'You are Qwen, created by Alibaba Cloud. You are a helpful"]),
        ("llama3_2", ["writes today's date"]),
        (
            "{% if messages[0].role != 'system' %}<s>Today is {{ strftime_now('%d') }}.</s>{% endif %}"
            "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</{{ m.role[0] }}>{% endfor %}",
            ["writes today's date", "where a conversation has none: 'Today is"],
        ),
    ],
    ids=["own", "gemma", "qwen3", "llama3", "qwen2.5", "llama3.2", "both"],
)  # fmt: skip
def test_what_a_template_adds_to_a_conversation_is_said(template, said):
    found = additions(tokenizer(template))
    assert len(found) == len(said) and all(words in line for words, line in zip(said, found, strict=True))
