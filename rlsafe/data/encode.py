"""Conversations -> token ids and answer masks, through the tokenizer's own chat template.

The answer tokens of a turn are those that the model would have to generate: everything after the generation prompt, up
to and including the end-of-turn token. Template whitespace behind that token is never sampled, so it is not trained on
either; nor are tokens of the generation prompt, some of which TRL's Qwen2.5 template marks with `{% generation %}`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, NoReturn

import numpy as np

from rlsafe.config import UserError
from rlsafe.data.control import Control, Offsets
from rlsafe.data.spans import Spans
from rlsafe.data.thinking import CLOSE, OPEN, SWITCHES, Chat, Thought, decode_with_tags, split_think
from rlsafe.data.turns import Key, key_of, opened, start_of, weights_of
from rlsafe.types import Message

TrainOn = Literal["last", "all"]
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
AS_IT_IS: dict[str, Any] = {"add_special_tokens": False, "verbose": False}  # lengths are looked at elsewhere
_PROBE = "zqxzqx"  # an answer that no template contains


@dataclass(frozen=True)
class Encoded:
    """ids [T] int64, mask [T] bool: True on answer tokens. Shared by all users of the cache: do not write into them."""

    ids: np.ndarray
    mask: np.ndarray


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation with the generation prompt appended: what a sampler is given."""
    return list(encoder_for(tokenizer).prompt(key_of(messages)))


def encode_row(tokenizer: Any, messages: Sequence[Message], train_on: TrainOn = "last") -> tuple[list[int], list[bool]]:
    """(ids, mask), both [T]. `last`: the row ends with its answer, and `encode_prompt` of the rest is its exact prefix.
    `all`: every assistant turn is an answer (by `{% generation %}` markers, TRL's where the template has none).

    Raises UserError for a row without answer, and for a chat template that is missing or cannot tell the answer apart.
    """
    encoded = encoded_row(tokenizer, messages, train_on)
    return encoded.ids.tolist(), encoded.mask.tolist()


def encoded_row(tokenizer: Any, messages: Sequence[Message], train_on: TrainOn = "last") -> Encoded:
    """`encode_row` as shared arrays, without copying."""
    return encoder_for(tokenizer).row(key_of(messages), train_on)


def read_completion(tokenizer: Any, ids: Sequence[int]) -> Thought:
    """A completion's think block and answer; knows whether the generation prompt already opened the block."""
    encoder, text = encoder_for(tokenizer), read_text(tokenizer, ids)
    thinks = encoder.opened or text.lstrip().startswith(OPEN)
    return split_think(text, encoder.opened) if thinks else Thought(None, text, False)


def read_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """A completion's text without special tokens, but with its think tags, which some tokenizers call special."""
    tags = encoder_for(tokenizer).tags
    if tags.keys() & set(ids):
        return decode_with_tags(tokenizer, ids, tags)
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def configure_chat(tokenizer: Any, chat: Chat) -> None:
    """Encode this tokenizer's conversations as `chat` says from now on. UserError when its template cannot."""
    tokenizer.rlsafe_chat = Chat()
    encoder = encoder_for(tokenizer)
    if chat.thinking in ("on", "off") and encoder.switch is None:
        raise UserError(
            f"model.thinking: {chat.thinking}: the chat template does not read {' or '.join(SWITCHES)}; leave it null"
            f"{', or no_think' if chat.thinking == 'off' else ''}"
        )
    tokenizer.rlsafe_chat = chat


def pad_id(tokenizer: Any) -> int:
    """The id to pad with (masked everywhere): the tokenizer's, or its end-of-text id, or 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an assistant turn in the chat template; the tokenizer's eos where there is none."""
    encoder = encoder_for(tokenizer)
    return encoder.end if encoder.end is not None else tokenizer.eos_token_id


def encoder_for(tokenizer: Any) -> Encoder:
    """The encoder of this tokenizer, with its cache; a new one after the chat template or the chat settings changed."""
    return _encoder(tokenizer, str(tokenizer.chat_template), getattr(tokenizer, "rlsafe_chat", Chat()))


@lru_cache(maxsize=8)
def _encoder(tokenizer: Any, template: str, chat: Chat) -> Encoder:
    return Encoder(tokenizer, chat)


class Encoder:
    """One tokenizer and its chat template. Keeps what it encoded, because every epoch encodes the same rows."""

    def __init__(self, tokenizer: Any, chat: Chat):
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; use a chat model or give one "
                "with model.chat_template: FILE.jinja"
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        self.tokenizer, self.jinja = tokenizer, render_jinja_template
        self.own: str = tokenizer.get_chat_template()
        self.written, added = dict(tokenizer.special_tokens_map), tokenizer.get_added_vocab()
        self.special = {*tokenizer.all_special_ids, *added.values()}
        known = tokenizer.added_tokens_decoder.items()
        self.tags = {i: str(token) for i, token in known if token.special and str(token) in (OPEN, CLOSE)}
        self.foreign = {i: t for t, i in added.items() if chat.embedded is not None and i >= chat.embedded}
        self.control = Control(tokenizer, self._probe(), (OPEN, CLOSE))
        self.chat, self.switch = chat, self._find_switch()
        set_to = {"on": True, "off": False}.get(chat.thinking or "")
        self.switches = {} if self.switch is None or set_to is None else {self.switch: set_to}
        self.end = self._find_end()
        self.header, self.opened = self._find_header()
        self.spans = Spans(tokenizer, self.header, self.opened, self.end, self.special)
        self.prompt = lru_cache(maxsize=65536)(self._prompt)
        self.row = lru_cache(maxsize=65536)(self._row)

    # ------------------------------------------------------------------------------------------ the template

    def render(
        self,
        messages: Key,
        generation_prompt: bool,
        template: str | None = None,
        switches: dict[str, Any] | None = None,
    ) -> str:
        """The conversation as text, by the chat template. UserError when the template fails."""
        conversation, offered = opened(messages)
        try:
            rendered, _ = self.jinja(  # what `apply_chat_template` calls, without its third of the time
                conversations=[conversation],
                chat_template=template or self.own,
                add_generation_prompt=generation_prompt,
                **self.written,
                **offered,
                **(self.switches if switches is None else switches),
            )
            return rendered[0]
        except Exception as error:  # a template may raise anything
            roles = ", ".join(turn[0] for turn in messages)
            raise UserError(f"the chat template cannot render a conversation of roles ({roles}): {error}") from None

    def tokenize(self, text: str) -> list[int]:
        hidden = self.control.hidden.search(text)
        ids = self.control.tokenize(text)[0] if hidden else self.tokenizer(text, **AS_IT_IS)["input_ids"]
        return ids if self.foreign.keys().isdisjoint(ids) else self._refused(ids, text)

    def conversation(self, messages: Key) -> Key:
        """The turns as the template is to see them, no control token spelled in any."""
        if self.chat.thinking:
            messages = self.chat.conversation(messages)
        spelled = any(self.control.spelled.search(part) for turn in messages for part in turn[1:])
        return self.control.hide(messages) if spelled else messages

    def _probe(self) -> str:
        """What the template writes around turns, as far as it writes them."""
        asked: Key = (("user", "hi"), ("assistant", _PROBE), ("user", "hi"))
        texts = []
        for turns in (asked, (("system", "hi"), *asked)):
            with suppress(UserError):
                texts.append(self.render(turns, True, switches={}))
        return "".join(texts)

    def _refused(self, ids: list[int], text: str) -> NoReturn:
        """UserError: the model does not embed one of these tokens."""
        one = min(self.foreign.keys() & set(ids))
        raise UserError(
            f"{self.foreign[one]!r} is a token ({one}) that the model does not embed; remove it from this text: "
            f"{text[:200]!r}"
        )

    def _find_end(self) -> int | None:
        text = self.render((("user", "hi"), ("assistant", _PROBE)), False)
        if _PROBE not in text:
            raise UserError(
                "the chat template leaves out the assistant's answer; give another with model.chat_template"
            )
        return next((i for i in self.tokenize(text.rpartition(_PROBE)[2]) if i in self.special), None)

    def _find_switch(self) -> str | None:
        """The variable that turns the template's thinking on and off: the one that changes the generation prompt."""
        asked: Key = (("user", "hi"),)
        for name in SWITCHES:
            if self.render(asked, True, switches={name: True}) != self.render(asked, True, switches={name: False}):
                return name
        return None

    def _find_header(self) -> tuple[list[int], bool]:
        """Ids of the generation prompt, such as `<|im_start|>assistant\\n`, and whether it opens a think block."""
        asked = (("user", "hi"),)
        bare, prompted = self.render(asked, False), self.render(asked, True)
        header = prompted[len(bare) :] if prompted.startswith(bare) else ""
        return self.tokenize(header), prompted.rstrip().endswith(OPEN)

    @cached_property
    def digest(self) -> str:
        """Of all that decides on the tokens of a conversation: template, chat settings, vocabulary."""
        parts = [self.own, repr(self.chat), str(self.written), self.tokenizer.backend_tokenizer.to_str()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def training(self) -> str:
        """A template with generation markers: the tokenizer's own or TRL's variant of it. UserError when there is neither."""
        if MARKERS.search(self.own):
            return self.own
        from trl.chat_template_utils import get_training_chat_template

        try:
            return get_training_chat_template(self.tokenizer) or self.own
        except ValueError:
            raise UserError(
                "the chat template has no {% generation %} markers and TRL knows no variant of it that has; "
                "give one with model.chat_template: FILE.jinja"
            ) from None

    # ------------------------------------------------------------------------------------------ rows

    def _prompt(self, messages: Key) -> tuple[int, ...]:
        return tuple(self.tokenize(self.render(self.conversation(messages), True)))

    def _row(self, messages: Key, train_on: TrainOn) -> Encoded:
        weights = weights_of(messages)
        train_on = "all" if weights is not None else train_on
        if train_on == "last" and messages[-1][0] != "assistant":
            raise UserError(
                f"a row ends with a {messages[-1][0]} turn; sft needs an answer to train on: {start_of(messages)}"
            )
        ids, mask = self._last(messages) if train_on == "last" else self._all(self.conversation(messages), weights)
        if not self.chat.train_thinking:
            mask = self.spans.without_thinking(ids, mask)
        if not any(mask):
            what = ": all its answers have weight 0" if weights and not any(weights) else ""
            raise UserError(f"a row has no answer tokens to train on{what}: {start_of(messages)}")
        return Encoded(np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=bool))

    def _last(self, messages: Key) -> tuple[list[int], list[bool]]:
        """The prompt as it will be sampled from, then the answer. The template's own rendering is used: history in
        a row looks as it will at generation (Qwen3, for one, drops earlier think blocks)."""
        whole = self.conversation(messages)
        prompt_text, text = self.render(whole[:-1], True), self.render(whole, False)
        if not text.startswith(prompt_text):
            ids, mask = self._all(whole)  # e.g. a generation prompt that opens a think block the answer lacks
            start = max((i for i in range(len(ids)) if mask[i] and (i == 0 or not mask[i - 1])), default=len(ids))
            return ids, [masked and i >= start for i, masked in enumerate(mask)]
        prompt, ids = self.prompt(messages[:-1]), self.tokenize(text)
        answer = ids[len(prompt) :]
        if tuple(ids[: len(prompt)]) != prompt:
            # the answer's first characters merged with the prompt's last: impossible at generation
            answer = self.tokenize(text[len(prompt_text) :])
            if self.tokenizer.decode([*prompt, *answer]) != self.tokenizer.decode(ids):
                raise UserError(f"the prompt is no token prefix of its row in this chat template: {start_of(messages)}")
        answer = self._ended(answer, messages)
        return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)

    def _ended(self, answer: list[int], messages: Key) -> list[int]:
        """The answer up to its end-of-turn token; eos is appended where the template writes none."""
        if self.end is None:
            eos = self.tokenizer.eos_token_id
            return answer if eos is None else [*answer, eos]
        if (stop := self.spans.stop_of(answer)) is None:
            raise UserError(f"the chat template writes no end of the turn behind this answer: {start_of(messages)}")
        return answer[:stop]

    def _all(self, messages: Key, weights: list[bool] | None = None) -> tuple[list[int], list[bool]]:
        """Every assistant turn by the template's generation spans, or those with a weight. Spans are mapped by character offsets
        here: `return_assistant_tokens_mask` marks the whole rest of a row when a span's last character makes no token."""
        self.render(messages, False, self.training)  # reports what the template cannot render
        conversation, offered = opened(messages)
        texts, spans = self.jinja(
            conversations=[conversation],
            chat_template=self.training,
            return_assistant_tokens_mask=True,
            **self.written,
            **offered,
            **self.switches,
        )
        ids, offsets = self._with_offsets(texts[0])
        wanted = [True] * len(spans[0]) if weights is None else weights
        if len(wanted) != len(spans[0]):
            raise UserError(
                f"the chat template marks {len(spans[0])} of {len(wanted)} assistant turns; which of them to train on cannot be "
                f"told: {start_of(messages)}"
            )
        mask = [False] * len(ids)
        for (first, last), trained in zip(spans[0], wanted, strict=True):
            first, last = (place + self.control.grown(texts[0][:place]) for place in (first, last))
            tokens = [i for i, (start, stop) in enumerate(offsets) if first <= start < last and stop > start]
            if tokens and trained:
                start, stop = self.spans.trimmed(ids, tokens[0], tokens[-1] + 1)
                mask[start:stop] = [True] * (stop - start)
        length = max((i + 1 for i, masked in enumerate(mask) if masked), default=len(ids))
        return ids[:length], mask[:length]  # nothing is predicted behind the last answer

    def _with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        if self.control.hidden.search(text):
            ids, offsets = self.control.tokenize(text)
        else:
            encoding = self.tokenizer(text, **AS_IT_IS, return_offsets_mapping=True)
            ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        return (ids, offsets) if self.foreign.keys().isdisjoint(ids) else self._refused(ids, text)
