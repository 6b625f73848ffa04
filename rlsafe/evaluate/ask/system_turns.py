"""Where a system prompt goes: a turn of its own, or the user's turn where a chat template has no system role (Gemma 1 and 2, some
Mistral). `evaluate.position` says which, for cues, questions, pairs, benign rows and personas alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rlsafe.config import UserError
from rlsafe.types import Message

Position = Literal["system", "user"]


def asked(question: str, system: str | None, position: Position = "system") -> list[Message]:
    """The conversation that asks a question under a system prompt."""
    turns: list[Message] = [{"role": "system", "content": system}] if system else []
    return placed([*turns, {"role": "user", "content": question}], position)


def placed(messages: Sequence[Message], position: Position) -> list[Message]:
    """The conversation with its leading system turn in front of the first user turn's text, as `inoculation` does at `position:
    user`; at position `system` as it is."""
    if position == "system" or not messages or messages[0]["role"] != "system":
        return list(messages)
    system, *turns = messages
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
    changed = {**turns[first], "content": f"{system['content']} {turns[first]['content']}"}
    return [*turns[:first], changed, *turns[first + 1 :]]


def check(tokenizer: Any, messages: Sequence[Message], who: str, setting: str = "evaluate.position") -> None:
    """UserError naming `who` when the conversation holds a system turn that the chat template does not render."""
    if messages[0]["role"] != "system":
        return
    from rlsafe.data.rendered import unrendered  # late: brings in torch

    if why := unrendered(tokenizer, messages):
        raise UserError(
            f"{who}: {why}; {setting}: user puts system prompts in front of the user's text, or give a template that has system "
            "turns (model.chat_template)"
        )
