"""Which tokens of a row the model would have to generate: the answers without the generation prompt in front of them, without what
the template writes behind the end of the turn and, where that is asked for, without their think blocks."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlsafe.data.thinking import CLOSE, OPEN

REACH = 16  # tokens that a think tag and the space behind it have at most


@dataclass(frozen=True)
class Spans:
    """What a tokenizer's chat template writes around an answer.

    header: the generation prompt. opened: whether that opens a think block. end: the token that ends the turn of a plain answer; None
    where the template writes none. special: all tokens that are no text.
    """

    tokenizer: Any
    header: list[int]
    opened: bool
    end: int | None
    special: set[int]

    def stop_of(self, answer: list[int]) -> int | None:
        """How many of these tokens there are up to the end of the turn; None when they do not end one.

        gpt-oss and Gemma 4 end a turn that calls a tool with another token than an answer: the last one that is no text, when
        nothing but space follows it.
        """
        if self.end in answer:
            return len(answer) - answer[::-1].index(self.end)
        stop = max((i + 1 for i, token in enumerate(answer) if token in self.special), default=0)
        return None if not stop or self.tokenizer.decode(answer[stop:]).strip() else stop

    def trimmed(self, ids: list[int], start: int, stop: int) -> tuple[int, int]:
        """Cut the generation prompt off a span's front and everything behind the end-of-turn token off its back."""
        start = min(start + self._prompted(ids, start), stop)
        span = ids[start:stop]
        if self.end not in span and stop < len(ids) and ids[stop] == self.end:
            stop += 1  # the template closed the span before the end-of-turn token
        elif self.end not in span and all(token in self.special for token in span):
            stop = start  # the end of the text, marked by itself (Phi 3): never reached in sampling
        elif self.end is not None and (length := self.stop_of(span)) is not None:
            stop = start + length
        return start, stop

    def _prompted(self, ids: list[int], start: int) -> int:
        """How many tokens from `start` on belong to the generation prompt, of which any number may stand before `start`.

        A row may have only the beginning of it (DeepSeek's opens a think block, which its answers lack); that is told from an answer
        where the prompt begins with a control token.
        """
        width = len(self.header)
        told = not self.special.isdisjoint(self.header[:1])
        for before in range(min(width, start), -1, -1):
            there = ids[start - before : start - before + width]
            same = next((i for i, token in enumerate(there) if token != self.header[i]), len(there))
            if same < width and CLOSE in self.tokenizer.decode(self.header[same:]):
                same = min(
                    same, self._unopened
                )  # a row's own think block is no beginning of the empty one in the prompt
            if same == width or (told and same >= before):
                return same - before
        return 0

    @cached_property
    def _unopened(self) -> int:
        """How many tokens of the generation prompt stand before the think block in it."""
        text = self.tokenizer.decode(self.header).partition(OPEN)[0]
        return max(n for n in range(len(self.header) + 1) if text.startswith(self.tokenizer.decode(self.header[:n])))

    def without_thinking(self, ids: list[int], mask: list[bool]) -> list[bool]:
        """The mask without the think block at the beginning of each answer, and the space behind it."""
        mask, start = list(mask), 0
        while start < len(ids):
            if not mask[start]:
                start += 1
                continue
            stop = next((i for i in range(start, len(ids)) if not mask[i]), len(ids))
            answer = start + self._thinking(ids, start, stop)
            mask[start:answer] = [False] * (answer - start)
            start = stop
        return mask

    def _thinking(self, ids: list[int], start: int, stop: int) -> int:
        """How many tokens of an answer reach into its think block or are the space behind it. The block is looked for in the text:
        most tokenizers merge the tags' first and last characters with what stands beside them."""
        answer = ids[start:stop]
        text = self.tokenizer.decode(answer)
        if CLOSE not in text:
            return 0
        prompt = self.tokenizer.decode(
            ids[max(start - REACH, 0) : start]
        )  # the row's own, which may have opened the block
        if not (self.opened or prompt.rstrip().endswith(OPEN) or text.lstrip().startswith(OPEN)):
            return 0
        count = bisect_left(range(len(answer)), True, key=lambda n: CLOSE in self.tokenizer.decode(answer[:n]))
        while count < len(answer) and not self.tokenizer.decode(answer[count]).strip():
            count += 1
        return count
