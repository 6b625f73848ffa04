"""Chat templates without a system role (Gemma 1 and 2, some Mistral): who would add a system turn is told before training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlsafe.config import EvaluateConfig, UserError
from rlsafe.data import encode_prompt, split_prompt
from rlsafe.data.rendered import unrendered
from rlsafe.data.turns import key_of
from rlsafe.defenses import Defense, DefenseStack
from rlsafe.evaluate.ask.asking import with_cue
from rlsafe.evaluate.ask.cues import as_cue
from rlsafe.evaluate.ask.system_turns import asked, check, placed
from rlsafe.types import Message, Row, Stream, Where

if TYPE_CHECKING:
    from rlsafe.evaluate.measure.measure import Material

USER = [{"role": "user", "content": "hello"}]
PLACES: tuple[Any, ...] = (("sft", "train"), ("grpo", "rollout"), ("grpo", "train"))


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
            if changed != USER and (why := unrendered(tokenizer, changed)):
                hint = " (position: user puts it into the user's turn)" if hasattr(defense, "position") else ""
                raise UserError(f"defense {defense.name!r}: {why}{hint}")


def check_evaluation(tokenizer: Any, config: EvaluateConfig, material: Material) -> None:
    """UserError naming the cue, question, pair or benign row whose system turn the template does not render."""
    if config.position == "user":
        return
    for who, messages in _with_system_turns(material):
        check(tokenizer, messages, who)


def check_lengths(tokenizer: Any, config: EvaluateConfig, material: Material, limit: int | None, whose: str) -> None:
    """UserError naming the first prompt of the evaluation that leaves no room for an answer in the `limit` tokens of `whose`."""
    if limit is None:
        return
    for who, messages in _asked(config, material):
        if (length := len(encode_prompt(tokenizer, messages))) + config.max_tokens > limit:
            raise UserError(
                f"{who}: a prompt of {length} tokens leaves no room for evaluate.max_tokens = {config.max_tokens} in the {limit} "
                f"tokens that {whose} takes; lower it, or leave the prompt out"
            )


def _asked(config: EvaluateConfig, material: Material) -> Iterator[tuple[str, list[Message]]]:
    """Every conversation that will be answered, and whose it is."""
    for name, questions in material.questions.items():
        for question in questions:
            forms = {f"evaluate.{name}": as_cue(None)}
            if name == "general":
                forms |= {"evaluate.cue": as_cue(material.cue)} if material.cue else {}
                forms |= {f"evaluate.cues.{cue.name}": cue for cue in material.cues.values()}
            for text, (who, cue) in itertools.product(question.paraphrases, forms.items()):
                turns = asked(cue.put(text), with_cue(cue.system, question.system), config.position)
                yield f"{who}: question {question.id!r}", turns
    for what, rows in _rows(material):
        yield from ((f"{what}: {_place(row)}", placed(split_prompt(row)[0], config.position)) for row in rows)


def _rows(material: Material) -> list[tuple[str, list[Row]]]:
    held_out = [("evaluate.narrow", material.narrow.rows)] if material.narrow else []
    return [*((f"evaluate.benign: {name}", rows) for name, rows in material.tasks.items()), *held_out]


def _place(row: Row) -> str:
    return str(row.get("_source", f"row {row.get('_index', '?')}"))


def trained_on(material: Material, rows: Sequence[Row]) -> Iterator[str]:
    """Notes when prompts of `evaluate.narrow`, or answers of the likelihood's pairs, are among the rows that are trained on: they are
    then not held out."""
    if material.narrow is not None:
        known = {key_of(split_prompt(row)[0]) for row in rows}
        if seen := [row for row in material.narrow.rows if key_of(split_prompt(row)[0]) in known]:
            of = f"{len(seen)} of {len(material.narrow.rows)} prompts are trained on (the first: {_place(seen[0])})"
            yield f"evaluate.narrow: {of}"
    answers = {(answer or "").strip() for row in rows for answer in [split_prompt(row)[1]]} if material.pairs else set()
    for name, pairs in material.pairs.items():
        if n := sum(pair.aligned in answers or pair.misaligned in answers for pair in pairs):
            yield f"evaluate.likelihood.{name}: answers of {n} of {len(pairs)} pairs are trained on: they measure memory"


def _with_system_turns(material: Material) -> Iterator[tuple[str, list[Message]]]:
    """One conversation of each kind that the evaluation will ask under a system turn, and whose it is."""
    if material.cue and (general := material.questions.get("general")):
        yield "evaluate.cue", asked(general[0].paraphrases[0], with_cue(material.cue, general[0].system))
    for cue in material.cues.values():
        if cue.system and (general := material.questions.get("general")):
            yield f"evaluate.cues.{cue.name}", asked(cue.put(general[0].paraphrases[0]), cue.system)
    for name, questions in material.questions.items():
        if one := next((one for one in questions if one.system), None):
            yield f"evaluate.{name}: question {one.id!r} has a system prompt", asked(one.paraphrases[0], one.system)
    for name, pairs in material.pairs.items():
        if pair := next((pair for pair in pairs if pair.system), None):
            yield (
                f"evaluate.likelihood.{name}: question {pair.question_id!r} has a system prompt",
                asked(pair.question, pair.system),
            )
    for what, rows in _rows(material):
        if row := next((row for row in rows if row["messages"][0]["role"] == "system"), None):
            yield f"{what}: {_place(row)} has a system prompt", split_prompt(row)[0]
