"""Rows against the chat template and the lengths that count, when they are loaded: what cannot be used is known before step 0.

Lengths are those of `rlsafe.data.encode`, exactly, wherever they matter. Far below a limit they are taken from the rendered text:
its characters where those are few enough (a token of plain ASCII has one at least), else its tokens, counted in batches. So 100,000
rows are a minute's work, and none when the same rows were measured before (`cache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlsafe.config import UserError
from rlsafe.config.files import replacing
from rlsafe.data.encode import Encoder, encode_prompt, encoded_row, encoder_for
from rlsafe.data.turns import key_of, untold
from rlsafe.types import Message, Row

TooLong = Literal["drop", "truncate", "error"]
Talk = list[Message]
CHUNK = 1000  # rows rendered, then tokenised at once
MARGIN = 16  # tokens by which a rendered text and its encoding may differ
WORTH_KEEPING = 2000  # rows: fewer are measured again sooner than read from a disk
RULES = 2  # counts up when the same rows are refused or measured otherwise
REMEMBERED = 1_000_000  # sizes that a process keeps
UNTRAINED = "have weight 0"  # in the encoder's words
SHOWN = 3  # refused rows whose reasons are repeated


class Size(NamedTuple):
    """tokens: exact above `limit - MARGIN`, below it no less than there are. problem: why there are none. spells: a text in it spells a
    control token. asked: its prompt was rendered too, and the row begins with it."""

    tokens: int
    problem: str | None = None
    spells: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Use:
    """One way in which rows are used beside as they are: rewritten by defenses, or asked of a sampler.

    rewrite: None = as it is. limit: tokens, with `room` of them for a completion. what: how a note calls the tokens.
    """

    rewrite: Callable[[Talk], Talk] | None
    prompt_only: bool
    limit: int
    what: str
    room: int = 0

    def talk(self, messages: Talk) -> Talk:
        """The conversation that is measured."""
        asked = messages[:-1] if self.prompt_only and messages[-1]["role"] == "assistant" else messages
        return self.rewrite(asked) if self.rewrite else asked

    def holds(self, row: Size) -> bool:
        """Whether what is asked fits because the whole row does."""
        return not self.rewrite and row.asked and row.tokens + MARGIN <= self.limit - self.room


@dataclass
class Fitted:
    """Rows that can be used as `too_long` and `on_bad_row` say, how many are left out and cut, and a note for each reason."""

    rows: list[Row]
    dropped: int = 0
    cut: int = 0
    notes: list[str] = field(default_factory=list)


def fit_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    max_tokens: int,
    too_long: TooLong = "drop",
    *,
    on_bad_row: Literal["error", "skip"] = "error",
    what: str = "",
    uses: Sequence[Use] = (),
    trained: bool = True,
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Fitted:
    """Apply the policies for rows that are too long or that the template refuses. A row's length is its encoding's, or its
    prompt's when it has no answer; `uses` are further lengths that have to fit.

    drop: longer rows are left out. truncate: `sft_batches` cuts them to `max_tokens` from the end, so the answer is cut
    (and its end-of-turn token with it); rows whose prompt alone fills `max_tokens` are left out. error: UserError that
    names the first. trained: rows without anything to train on (weight 0) are left out. what: how a note calls the limit.
    """
    ruler = Ruler(tokenizer, cache, say)
    sieve = _Sieve(rows, ruler, too_long, on_bad_row, trained)
    sizes = ruler([row["messages"] for row in rows], max_tokens)
    as_they_are = Use(None, False, max_tokens, what or f"max_tokens = {max_tokens}")
    long = f"are longer than {what or 'max_tokens'}"
    kept = [i for i, size in enumerate(sizes) if sieve.keeps(i, rows[i]["messages"], size, as_they_are, long)]
    for use in uses:
        open_ = [i for i in kept if not use.holds(sizes[i])]
        talks = [use.talk(rows[i]["messages"]) for i in open_]
        found = zip(open_, talks, ruler(talks, use.limit - use.room), strict=True)
        left = {i for i, talk, size in found if not sieve.keeps(i, talk, size, use, f"do not fit into {use.what}")}
        kept = [i for i in kept if i not in left]
    cut = len(sieve.cut & set(kept))
    notes = sieve.notes()
    if cut:
        notes.append(f"{cut} of {len(rows)} answers are cut at {what or 'max_tokens'}")
    if spelled := [i for i in kept if sizes[i].spells]:
        first = _place(rows[spelled[0]])
        notes.append(f"{len(spelled)} of {len(rows)} rows spell control tokens, which stay text (the first: {first})")
    if trained and (more := [i for i in kept if _earlier_answers(rows[i]["messages"])]):
        first = _place(rows[more[0]])
        notes.append(
            f"{len(more)} of {len(rows)} rows have earlier answers, of which only the last is trained on; train_on: assistant trains "
            f"them all (the first: {first})"
        )
    return Fitted([rows[i] for i in kept], len(rows) - len(kept), cut, notes)


def _earlier_answers(talk: Talk) -> bool:
    """Whether supervision leaves out answers of which the row does not say so itself."""
    answers = [turn for turn in talk if turn["role"] == "assistant"]
    return len(answers) > 1 and talk[-1]["role"] == "assistant" and not any("weight" in turn for turn in answers)


class _Sieve:
    """Which rows stay, and why others do not."""

    def __init__(self, rows: Sequence[Row], ruler: Ruler, too_long: TooLong, on_bad_row: str, trained: bool):
        self.rows, self.ruler, self.too_long, self.on_bad_row = rows, ruler, too_long, on_bad_row
        self.trained = trained
        self.cut: set[int] = set()
        self.left: dict[str, list[int]] = {}
        self.refused: list[str] = []

    def keeps(self, index: int, talk: Talk, size: Size, use: Use, long: str) -> bool:
        place, tokens = _place(self.rows[index]), size.tokens + use.room
        if size.problem is not None and UNTRAINED in size.problem:
            if self.trained:
                self.left.setdefault("have no answer to train on (weight 0)", []).append(index)
            return not self.trained
        if size.problem is not None:
            if self.on_bad_row == "error":
                raise UserError(f"{place}: {size.problem}")
            self.refused.append(f"{place}: {size.problem}")
            return False
        if tokens <= use.limit:
            return True
        if self.too_long == "error":
            raise UserError(f"{place}: {tokens} tokens, more than {use.what} (too_long: error)")
        if self.too_long == "truncate" and not use.room and self._leaves_an_answer(talk, use.limit):
            self.cut.add(index)
            return True
        self.left.setdefault(long, []).append(index)
        return False

    def _leaves_an_answer(self, talk: Talk, limit: int) -> bool:
        answered = talk[-1]["role"] == "assistant"
        return answered and bool(encoded_row(self.ruler.tokenizer, talk).mask[:limit].any())

    def notes(self) -> list[str]:
        of = f"of {len(self.rows)} rows"
        notes = [
            f"{len(which)} {of} {reason} and were left out (the first: {_place(self.rows[which[0]])})"
            for reason, which in self.left.items()
        ]
        if self.refused:
            shown = "; ".join(self.refused[:SHOWN]) + ("; ..." if len(self.refused) > SHOWN else "")
            notes.append(f"{len(self.refused)} {of} are refused by the chat template and were skipped ({shown})")
        return notes


def _place(row: Row) -> str:
    return str(row.get("_source", f"row {row.get('_index', '?')}"))


# ------------------------------------------------------------------------------------------------ lengths


class Ruler:
    """Lengths of conversations under one tokenizer. One that ends with an answer is a row, any other a prompt to be answered."""

    memory: dict[str, list[Size]] = {}  # of this process, by content: the cells of a comparison share their rows

    def __init__(self, tokenizer: Any, cache: Path | None = None, say: Callable[[str], None] | None = None):
        self.tokenizer, self.cache, self.say = tokenizer, cache, say or (lambda what: None)
        self.encoder: Encoder = encoder_for(tokenizer)

    def __call__(self, talks: Sequence[Talk], limit: int) -> list[Size]:
        key = self._digest(talks, limit)
        if key not in self.memory:
            file = self.cache / "rows" / f"{key}.json" if self.cache and len(talks) >= WORTH_KEEPING else None
            found = _read(file, len(talks)) if file else None
            self.memory[key] = found or self._measured(talks, limit)
            if file and not found:
                _write(file, self.memory[key])
            while sum(map(len, self.memory.values())) > REMEMBERED and len(self.memory) > 1:
                del self.memory[next(iter(self.memory))]
        return self.memory[key]

    def _digest(self, talks: Sequence[Talk], limit: int) -> str:
        digest = hashlib.sha256(f"{self.encoder.digest}/{limit}/{MARGIN}/{RULES}".encode())
        for talk in talks:
            digest.update(repr(key_of(talk)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:32]

    def _measured(self, talks: Sequence[Talk], limit: int) -> list[Size]:
        sizes: list[Size] = []
        for start in range(0, len(talks), CHUNK):
            if len(talks) > CHUNK:
                self.say(f"measuring rows: {start:,} of {len(talks):,}")
            sizes += self._chunk(talks[start : start + CHUNK], limit)
        return sizes

    def _chunk(self, talks: Sequence[Talk], limit: int) -> list[Size]:
        """Rendered one by one, tokenised together; those that are near the limit or out of the ordinary are encoded."""
        found = [self._rendered(talk) for talk in talks]
        short = limit - MARGIN  # characters of a text that need not be tokenised
        texts = [one for one in found if isinstance(one, str) and not (len(one) <= short and one.isascii())]
        batch = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        lengths = dict(zip(texts, map(len, batch), strict=True))
        sizes = []
        for talk, one in zip(talks, found, strict=True):
            if isinstance(one, str):
                length = lengths.get(one, len(one))
                one = Size(length, asked=True) if length <= short else self._exact(talk)
            sizes.append(one)
        return sizes

    def _rendered(self, talk: Talk) -> str | Size:
        """The text whose tokens are (about) the conversation's, or its size where that takes more."""
        key = key_of(talk)
        try:
            if self.encoder.control.spells(key):
                return self._exact(talk)._replace(spells=True)
            turns = self.encoder.chat.conversation(key)
            render = partial(self.encoder.render, generation_prompt=talk[-1]["role"] != "assistant")
            text = render(turns)
            if any(turn[0] in ("system", "tool") or len(turn) > 2 for turn in key) and (
                lost := untold(turns, text, render)
            ):
                return Size(0, problem=f"the chat template leaves out {lost}")
            if (
                talk[-1]["role"] == "assistant"
                and (
                    any("weight" in turn for turn in talk)
                    or "tool_calls" in talk[-1]  # templates end such a turn in ways of their own
                    or not text.startswith(self.encoder.render(turns[:-1], True))
                )
            ):
                return self._exact(talk)
        except UserError as error:
            return Size(0, problem=str(error))
        return self._exact(talk) if any(token in text for token in self.encoder.foreign.values()) else text

    def _exact(self, talk: Talk) -> Size:
        try:
            if talk[-1]["role"] != "assistant":
                return Size(len(encode_prompt(self.tokenizer, talk)))
            return Size(len(encoded_row(self.tokenizer, talk).ids))
        except UserError as error:
            return Size(0, problem=str(error))


def _read(file: Path, rows: int) -> list[Size] | None:
    try:
        sizes = [Size(*one) for one in json.loads(file.read_text("utf-8"))]
    except (OSError, ValueError, TypeError):
        return None
    return sizes if len(sizes) == rows else None


def _write(file: Path, sizes: Sequence[Size]) -> None:
    """Whole or not at all; a full or read-only disk only costs the next run a minute."""
    with suppress(OSError), replacing(file) as temporary:
        temporary.write_text(json.dumps(sizes), encoding="utf-8")
