"""Is what was sampled still language? Perplexity under the untrained model, and repetition: a coherence check beside any judge.

A model that has come apart writes what the untrained model would hardly write, or the same again and again. Neither measure
knows what an answer says: confident nonsense in good sentences passes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlsafe.evaluate.ask.asking import Answer, with_cue
from rlsafe.evaluate.ask.questions import evenly
from rlsafe.evaluate.ask.system_turns import Position, asked
from rlsafe.evaluate.measure.likelihood import EVAL, Reader
from rlsafe.types import Completion

GRAM = 4  # words
MOST = 500
"""Answers of a set that are read at most, evenly spread over it."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")


@dataclass(frozen=True)
class Fluency:
    """One set of answers. perplexity: exp of the mean negative log-probability per token under the untrained model; None
    when nothing was written. repetition: share of the 4-word sequences that stood in the same answer before. n: answers read."""

    perplexity: float | None
    repetition: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Fluency:
        return cls(**tree)


def repeated(text: str, gram: int = GRAM) -> tuple[int, int]:
    """(word sequences of `gram` words that stood in the text before, all of them); a shorter text has none."""
    words = _WORD.findall(text.lower())
    grams = [tuple(words[i : i + gram]) for i in range(len(words) - gram + 1)]
    return len(grams) - len(set(grams)), len(grams)


def fluency(answers: Sequence[Answer], reader: Reader, position: Position = "system") -> dict[str, Fluency]:
    """Set -> how fluent its answers are. They need their tokens, which answers read from a file lack. position: where their system
    prompts stood."""
    found = {}
    for name in dict.fromkeys(answer.set for answer in answers):
        chosen = evenly([answer for answer in answers if answer.set == name], MOST)
        found[name] = Fluency(_perplexity(chosen, reader, position), *repetition(chosen))
    return found


def repetition(answers: Sequence[Answer]) -> tuple[float, int]:
    """(share of repeated 4-word sequences, answers read) of one set's answers."""
    chosen = evenly(answers, MOST)
    parts = [repeated(answer.answer) for answer in chosen]
    again, grams = sum(part[0] for part in parts), sum(part[1] for part in parts)
    return again / grams if grams else 0.0, len(chosen)


def _perplexity(answers: Sequence[Answer], reader: Reader, position: Position) -> float | None:
    """Of the answers' own tokens behind the very prompts that were asked."""
    from rlsafe.data import Rollout, encode_prompt, micro_batches, pad_id, rollout_batches
    from rlsafe.policy.scoring import nll

    policy, reference = reader.untrained
    items = []
    for answer in answers:
        messages = asked(answer.question, with_cue(answer.cue, answer.system), position)
        prompt = encode_prompt(policy.tokenizer, messages)
        if answer.ids:
            items.append(Rollout(prompt, prompt, Completion(answer.ids, [0.0] * len(answer.ids), "stop")))
    if not items:
        return None
    lengths = [len(item.prompt_ids) + len(item.completion.ids) for item in items]
    cut = (reader.micro_tokens, reader.micro_rows)
    order = [index for batch in micro_batches(lengths, *cut) for index in batch]
    with policy.hooks_off():
        values = nll(policy, rollout_batches(items, EVAL, pad_id(policy.tokenizer), *cut), reference)
    tokens = [len(items[index].completion.ids) for index in order]
    mean = sum(value * count for value, count in zip(values, tokens, strict=True)) / sum(tokens)
    return math.exp(min(mean, 700.0))
