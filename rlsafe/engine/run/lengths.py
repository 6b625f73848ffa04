"""How many tokens the rows, questions and answers of a run have, on average, before it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlsafe.config import ModelConfig, StreamConfig, UserError
from rlsafe.data import load_rows, recipe_of, split_prompt
from rlsafe.data.turns import Key, key_of, opened
from rlsafe.defenses import Defense
from rlsafe.defenses.own_rows import SAFE, own_stream
from rlsafe.engine.plan.schedule import PlannedPart
from rlsafe.engine.plan.timing import LENGTH
from rlsafe.engine.run.build import Prepared, model_path
from rlsafe.engine.run.rows import rewriting
from rlsafe.policy.load import load_tokenizer
from rlsafe.types import Exchange, Message, Row, Where, provider_for

FRAME_OF_A_TURN = 6  # tokens that a chat template puts around a turn, about
LOOKED_AT = 64  # rows, questions or pairs whose tokens are counted: their mean is taken for all


class Lengths:
    """Mean numbers of tokens, counted on some rows where the tokenizer is on this machine; else four characters a token and six tokens
    around a turn, as in English; 400 where there is nothing to look at."""

    def __init__(self, prepared: Prepared):
        self.prepared, self.config = prepared, prepared.config
        self._model = self.config.model.model_dump_json(), model_path(self.config)
        self._known: dict[Any, Any] = {}

    def rows(self, source: str | None) -> Sequence[Row]:
        """See `Foreseen.rows`."""
        if source is None or source == SAFE:
            return self.prepared.rows.get("safe") or []
        for name, rows in self.prepared.rows.items():
            if getattr(self.config.data, name).source == source:
                return rows
        if source not in self._known:
            stream, self._known[source] = own_stream(source, self.config.data.safe), []
            away = remote(stream)
            try:
                if not (away and away.startswith("http")):  # reading it would use the network
                    self._known[source] = load_rows(stream, self.config.seed)
            except UserError:
                if away is None:
                    raise
        return self._known[source]

    def of_rows(self, part: PlannedPart, named: Mapping[str, Defense]) -> tuple[float, float]:
        """(tokens of a supervised row, of its answer), after the defenses' prompt hooks."""
        source = getattr(named.get(part.defense or ""), "source", None)
        name = "safe" if part.stream == "aside" else part.stream
        key = (name, source if isinstance(source, str) else None)
        if key not in self._known:
            rows = (
                self.rows(key[1]) if key[1] else self.prepared.rows.get(name) or self.prepared.rows.get("narrow") or []
            )
            whole = self._mean(rows, Where(part.stream, "sft", "train"))
            self._known[key] = whole, max(0.0, whole - self.prompts(rows)) if rows else whole / 2
        return self._known[key]

    def prompt(self, stream: str, phase: str) -> float:
        """Of a prompt in rollouts, or as it is trained on."""
        if (stream, phase) not in self._known:
            rows = [{"messages": split_prompt(row)[0]} for row in some(self.prepared.rows.get(stream) or [])]
            self._known[stream, phase] = self._mean(rows, Where(stream, "grpo", phase)) if rows else 200.0  # type: ignore[arg-type]
        return self._known[stream, phase]

    def answer(self, stream: str, most: int) -> float:
        """Of a sampled answer of at most `most`: as long as those of the rows, and no longer than LENGTH of what is allowed."""
        if (stream, "answer") not in self._known:
            rows = [row for row in some(self.prepared.rows.get(stream) or []) if split_prompt(row)[1]]
            self._known[stream, "answer"] = self._mean(rows) - self.prompts(rows) if rows else float("inf")
        return min(self._known[stream, "answer"], LENGTH * most)

    def prompts(self, rows: Sequence[Row]) -> float:
        """Of the rows without their answers."""
        return self.mean([split_prompt(row)[0] for row in some(rows)], 200.0)

    def questions(self, exchanges: Iterable[Exchange]) -> float:
        """Of what is asked, without cues."""
        return self.mean([[{"role": "user", "content": one.question}] for one in some(list(exchanges))], 60.0)

    def _mean(self, rows: Sequence[Row], where: Where | None = None) -> float:
        rewrite = rewriting(self.prepared.defenses, where) if where else None
        return self.mean([rewrite(row["messages"]) if rewrite else row["messages"] for row in some(rows)])

    def mean(self, conversations: Sequence[list[Message]], guess: float = 400.0) -> float:
        """Over conversations; `guess` when there are none."""
        if not conversations:
            return guess
        if read_tokenizer(*self._model) is not None:
            return sum(_tokens(*self._model, key_of(one)) for one in conversations) / len(conversations)
        turns = [message["content"] for one in conversations for message in one]
        return (sum(map(len, turns)) / 4 + FRAME_OF_A_TURN * len(turns)) / len(conversations)


def some(things: Sequence[Any]) -> Sequence[Any]:
    """Some of them, evenly spread, which stand for all."""
    return things[:: max(1, len(things) // LOOKED_AT)]


@lru_cache(maxsize=1 << 16)
def _tokens(model: str, path: str, conversation: Key) -> int:
    """Of a conversation under the tokenizer of `read_tokenizer`. The cells of a comparison share their rows."""
    quiet = {"verbose": False}  # a row above the limit is left out later, which a note says
    tokenizer = read_tokenizer(model, path)
    return len(tokenizer.apply_chat_template(opened(conversation)[0], return_dict=False, tokenizer_kwargs=quiet))


@lru_cache
def read_tokenizer(model: str, path: str) -> Any:
    """That of a model directory on this machine, else None."""
    if not Path(path).is_dir():
        return None
    try:
        return load_tokenizer(ModelConfig.model_validate_json(model), path)
    except UserError:
        return None  # loading the model says why


def remote(stream: StreamConfig) -> str | None:
    """The hub id or URL behind a stream; None when it is a file or comes from a provider."""
    source = recipe_of(stream).source
    preset = source.startswith("preset:") and recipe_of(StreamConfig(source=source)).source
    source = preset or source
    if source.startswith(("http://", "https://")):
        return source
    local = Path(source).expanduser()
    if provider_for(source) or local.exists() or local.suffix or source.count("/") != 1:
        return None
    return source
