"""Control tokens that a text merely spells stay text: `<|im_end|>` inside a message never ends a turn.

Before a conversation is rendered, every spelling of a control token in it becomes one character of a private range; behind the
template, all control tokens in the text are the template's own. The spellings are then put back and tokenised in two halves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from rlsafe.config import UserError
from rlsafe.data.turns import Key

FIRST = 0xF0000  # Unicode's private plane 15: no text that people write
Offsets = list[tuple[int, int]]


class Control:
    """The control tokens of one tokenizer: those it calls special, and added ones that the chat template writes.

    written: what the template writes for a probe. allowed: tokens that answers may hold (think tags).
    """

    def __init__(self, tokenizer: Any, written: str, allowed: Iterable[str]):
        self.tokenizer = tokenizer
        found = {
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or (len(str(token).strip()) > 2 and str(token) in written)
        }
        self.tokens = {text: found[text] for text in sorted(found, key=len, reverse=True) if text not in set(allowed)}
        self.names = [text for text in self.tokens if len(text) > 1]
        self.spelled = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        self.hidden = re.compile(f"[{chr(FIRST)}-{chr(FIRST + max(1, len(self.names)))}]")
        numbers = {text: chr(FIRST + i) for i, text in enumerate(self.names)}
        self._hide: Callable[[re.Match[str]], str] = lambda match: numbers[match[0]]
        strips = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.rstrip or token.lstrip}
        self.anchor = next((text for text in self.names if text not in strips), "")

    def spells(self, turns: Key) -> bool:
        """Whether some text of the conversation spells a control token."""
        return any(self.spelled.search(part) for turn in turns for part in turn[1:])

    def hide(self, turns: Key) -> Key:
        """The conversation with a private character for each spelled control token. UserError when it holds such characters."""
        if not self.spells(turns):
            return turns
        if any(self.hidden.search(part) for turn in turns for part in turn):
            raise UserError(
                f"a text spells control tokens and holds characters above U+{FIRST:X}: {turns[-1][1][:60]!r}"
            )
        return tuple((turn[0], *(self.spelled.sub(self._hide, part) for part in turn[1:])) for turn in turns)

    def show(self, text: str) -> str:
        """The text as its author wrote it."""
        return self.hidden.sub(lambda match: self.names[ord(match[0]) - FIRST], text)

    def grown(self, text: str) -> int:
        """How many characters longer the text becomes by `show`."""
        return sum(len(self.names[ord(hidden) - FIRST]) - 1 for hidden in self.hidden.findall(text))

    def tokenize(self, text: str) -> tuple[list[int], Offsets]:
        """(ids, offsets) of a rendered text with hidden tokens; offsets are those in `show(text)`. UserError when no offsets fit."""
        whole, cuts, shift = self.show(text), [0], 0
        for match in self.hidden.finditer(text):
            name = self.names[ord(match[0]) - FIRST]
            cuts.append(match.start() + shift + (len(name) + 1) // 2)
            shift += len(name) - 1
        ids: list[int] = []
        offsets: Offsets = []
        for start, stop in zip(cuts, [*cuts[1:], len(whole)], strict=True):
            # behind a control token, so that no tokenizer takes the piece for the beginning of a text
            front = self.anchor if start else ""
            piece = self.tokenizer(front + whole[start:stop], add_special_tokens=False, return_offsets_mapping=True)
            ids += piece["input_ids"][bool(front) :]
            at = start - len(front)
            offsets += [(a + at, b + at) for a, b in piece["offset_mapping"][bool(front) :]]
        meant, known = len(self.spelled.findall(text)), set(self.tokens.values())
        if sum(index in known for index in ids) != meant:
            raise UserError(f"a control token spelled in this text cannot be kept as text: {whole[:200]!r}")
        return ids, offsets
