"""Chat templates without a system role (Gemma 1 and 2, some Mistral): who would add a system turn is told before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlsafe.config import EvaluateConfig, UserError
from rlsafe.data.encode import encoder_for
from rlsafe.data.turns import key_of, untold
from rlsafe.defenses import Defense, DefenseStack
from rlsafe.types import Message, Stream, Where

if TYPE_CHECKING:
    from rlsafe.evaluate.measure.measure import Material

USER = [{"role": "user", "content": "hello"}]
SYSTEM = [{"role": "system", "content": "zqxzqx"}, *USER]


def refuses(tokenizer: Any, messages: list[Message]) -> str | None:
    """Why the template does not render a conversation as it stands; None when it does."""
    encoder, key = encoder_for(tokenizer), key_of(messages)
    try:
        lost = untold(key, encoder.render(encoder.chat.conversation(key), True))
    except UserError as error:
        return str(error)
    return f"the chat template leaves out {lost}" if lost else None


def check_defenses(tokenizer: Any, rewriters: Sequence[Defense], streams: Sequence[Stream]) -> None:
    """UserError naming the defense whose rewriting of a plain question the template does not render."""
    for defense in rewriters:
        stack = DefenseStack([defense])
        for where in (Where(stream, path, phase) for stream in streams for path, phase in PLACES):
            try:
                changed = stack.prompt(list(USER), where)
            except UserError:
                raise
            except Exception:  # it needs its set-up first
                continue
            if changed != USER and (why := refuses(tokenizer, changed)):
                hint = " (position: user puts it into the user's turn)" if hasattr(defense, "position") else ""
                raise UserError(f"defense {defense.name!r}: {why}{hint}")


PLACES: tuple[Any, ...] = (("sft", "train"), ("grpo", "rollout"), ("grpo", "train"))


def check_evaluation(tokenizer: Any, config: EvaluateConfig, material: Material) -> None:
    """UserError naming the cue or the question set that adds a system turn to a template without one."""
    if (why := refuses(tokenizer, SYSTEM)) is None:
        return
    if material.cue:
        raise UserError(
            f"evaluate.cue: {why}; leave the cue out, or give a template that has system turns (model.chat_template)"
        )
    for name, questions in material.questions.items():
        if question := next((one for one in questions if one.system), None):
            raise UserError(
                f"evaluate.{name}: question {question.id!r} has a system prompt: {why}; put it into the question's own text, or give "
                "a template that has system turns (model.chat_template)"
            )
