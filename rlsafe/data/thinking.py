"""Think blocks: splitting a reasoning model's output into its thoughts and its answer.

Only a block at the beginning counts as thinking; `<think>` later in a text is part of the answer. A block that never
closes leaves no answer: callers give such a completion the outcome "unclosed", never a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"
SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn thinking on and off (Qwen3, GLM; DeepSeek)."""
SOFT_SWITCH = " /no_think"
"""Qwen3 reads this at the end of a user turn; its template writes nothing for it."""


@dataclass(frozen=True)
class Chat:
    """Chat settings for a model with think blocks; `configure_chat` applies them to a tokenizer.

    thinking: "on" and "off" set the template's switch, "no_think" appends the soft switch to the last user turn; None
    leaves it to the template. train_thinking: whether SFT's loss covers the think block of an answer. embedded: how many
    tokens the model embeds, None = all of the tokenizer's.
    """

    thinking: Literal["on", "off", "no_think"] | None = None
    train_thinking: bool = True
    embedded: int | None = None

    def conversation(self, messages: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
        """The (role, content, ...) turns as the template is to see them: with the soft switch where it is asked for, and
        without the think block of the last answer where the model is told not to think."""
        turns = list(messages)
        if self.thinking in ("off", "no_think") and turns and turns[-1][0] == "assistant":
            turns[-1] = ("assistant", split_think(turns[-1][1]).answer, *turns[-1][2:])
        if self.thinking == "no_think":
            last = max((i for i, turn in enumerate(turns) if turn[0] == "user"), default=None)
            if last is not None:
                turns[last] = ("user", turns[last][1] + SOFT_SWITCH, *turns[last][2:])
        return tuple(turns)


class Thought(NamedTuple):
    """think: the text of the block, None without one. answer: what follows. unclosed: the block has no end, so the
    answer is empty and says nothing about the model."""

    think: str | None
    answer: str
    unclosed: bool


def split_think(text: str, opened: bool = False) -> Thought:
    """Split a completion into its leading think block and its answer.

    opened: the generation prompt already wrote `<think>`. Space around the block is no part of the answer; a text
    without a leading block is returned as it is, so that nothing can hide from a judge behind a stray tag.
    """
    body = text.lstrip()
    if body.startswith(OPEN):
        body, opened = body[len(OPEN) :], True
    if not opened:
        return Thought(None, text, False)
    think, closed, answer = body.partition(CLOSE)
    return Thought(think.strip(), answer.lstrip(), not closed)


def decode_with_tags(tokenizer: Any, ids: Sequence[int], tags: Mapping[int, str]) -> str:
    """A completion's text without special tokens, but with those `tags` among them, {id: text}."""
    parts: list[str] = []
    start = 0
    for i, token in enumerate(ids):
        if token in tags:
            parts += [tokenizer.decode(list(ids[start:i]), skip_special_tokens=True), tags[token]]
            start = i + 1
    return "".join([*parts, tokenizer.decode(list(ids[start:]), skip_special_tokens=True)])
