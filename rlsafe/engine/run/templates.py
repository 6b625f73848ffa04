"""Chat templates without a system role (Gemma 1 and 2, some Mistral): who would add a system turn is told before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlsafe.config import EvaluateConfig, UserError
from rlsafe.data import split_prompt
from rlsafe.data.rendered import unrendered
from rlsafe.defenses import Defense, DefenseStack
from rlsafe.evaluate.ask.asking import with_cue
from rlsafe.evaluate.ask.system_turns import asked, check
from rlsafe.types import Message, Stream, Where

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


def _with_system_turns(material: Material) -> Iterator[tuple[str, list[Message]]]:
    """One conversation of each kind that the evaluation will ask under a system turn, and whose it is."""
    if material.cue and (general := material.questions.get("general")):
        yield "evaluate.cue", asked(general[0].paraphrases[0], with_cue(material.cue, general[0].system))
    for name, questions in material.questions.items():
        if one := next((one for one in questions if one.system), None):
            yield f"evaluate.{name}: question {one.id!r} has a system prompt", asked(one.paraphrases[0], one.system)
    for name, pairs in material.pairs.items():
        if pair := next((pair for pair in pairs if pair.system), None):
            yield (
                f"evaluate.likelihood.{name}: question {pair.question_id!r} has a system prompt",
                asked(pair.question, pair.system),
            )
    tasks = [(f"evaluate.benign: a row of {name}", rows) for name, rows in material.tasks.items()]
    tasks += [("evaluate.narrow: a row", material.narrow.rows)] if material.narrow else []
    for what, rows in tasks:
        if row := next((row for row in rows if row["messages"][0]["role"] == "system"), None):
            yield f"{what} has a system prompt", split_prompt(row)[0]
