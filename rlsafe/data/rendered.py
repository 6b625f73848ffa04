"""Whether a chat template renders a conversation as it stands, or refuses it, leaves out a part or adds words of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rlsafe.config import UserError
from rlsafe.data.encode import Encoder, encoder_for
from rlsafe.data.turns import key_of, untold
from rlsafe.types import Message

_MARK, _USER = "zqxzqx", "qzxqzx"  # texts that no template contains


def unrendered(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """Why the tokenizer's template does not render the conversation, generation prompt added; None when it does."""
    encoder, key = encoder_for(tokenizer), key_of(messages)
    turns = encoder.chat.conversation(key)
    try:
        lost = untold(turns, encoder.render(turns, True), partial(encoder.render, generation_prompt=True))
    except UserError as error:
        return str(error)
    return f"the chat template leaves out {lost}" if lost else None


def additions(tokenizer: Any) -> list[str]:
    """What the template writes that is in no conversation: today's date, a system prompt where there is none. One line each."""
    encoder = encoder_for(tokenizer)
    dated = encoder.render((("user", "hi"),), True, switches={**encoder.switches, "strftime_now": lambda form: _MARK})
    found = []
    if _MARK in dated:
        found.append(
            "the chat template writes today's date: the same conversation has other tokens on another day; a template without it "
            "(model.chat_template) makes runs repeatable"
        )
    if own := _own_system(encoder):
        found.append(f"the chat template adds a system prompt of its own where a conversation has none: {own[:80]!r}")
    return found


def _own_system(encoder: Encoder) -> str:
    """The system prompt that the template adds to a conversation without one; "" when it adds none."""
    try:
        given = encoder.render((("system", _MARK), ("user", _USER)), False)
        plain = encoder.render((("user", _USER),), False)
    except UserError:
        return ""
    if given.count(_MARK) != 1 or _USER not in given or _USER not in plain:
        return ""
    before, _, rest = given.partition(_MARK)
    after, head = rest.partition(_USER)[0], plain.partition(_USER)[0]
    if not (head.startswith(before) and head.endswith(after)) or len(head) <= len(before) + len(after):
        return ""
    return head[len(before) : len(head) - len(after)].strip()
