"""The streams' rows as this run uses them: rendered with the model's template, rewritten by its defenses, held against its context."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlsafe.config import DataConfig, ModelConfig, RunConfig, UserError, nearest
from rlsafe.data import Use, fit_rows, with_answers
from rlsafe.data.rendered import additions
from rlsafe.defenses import Defense, DefenseStack
from rlsafe.engine.run.templates import check_defenses, check_evaluation, check_lengths, trained_on
from rlsafe.rewards import LoadedReward
from rlsafe.types import Message, Row, Where
from rlsafe.types import Stream as Name

if TYPE_CHECKING:
    from rlsafe.engine.run.build import Prepared

ENGINE_LENGTH = 4096  # what a vLLM engine takes unless sampler.max_model_len says otherwise
CACHE = Path.home() / ".cache" / "rlsafe"


@dataclass
class Rows:
    """The rows that can be used, by stream, and what became of the others. limits: tokens that a row of each stream may have."""

    streams: dict[str, list[Row]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def answered(
    streams: dict[str, list[Row]], trained: Collection[str], data: DataConfig, note: Callable[[str], None]
) -> dict[str, list[Row]]:
    """The streams' rows, those of `trained` (by supervision) without the ones that end without an answer: UserError for such a row, or
    a note where it is to be skipped. Rollouts of the stream do not ask them either."""
    kept = dict(streams)
    for name in sorted(trained):
        settings = getattr(data, name)
        kept[name] = with_answers(streams[name], settings.source, settings.on_bad_row, note)
    return kept


def cut_short(streams: dict[str, list[Row]], data: DataConfig) -> list[str]:
    """The streams, as loaded, of which `limit` takes a part of the rows."""
    return [name for name, rows in streams.items() if len(rows) == getattr(data, name).limit]


def check_where(rewards: list[LoadedReward], streams: dict[str, list[Row]], cut: Collection[str] = ()) -> list[str]:
    """UserError for a reward that is for rows that the sampled streams lack: of a column, or of a value that is nowhere in it. Notes,
    where `limit` takes the rows and the rest may have it, and where the others score every row and nothing was misspelt: data that were
    narrowed to one domain may keep the rewards of all. cut: the streams of which `limit` takes a part."""
    notes = []
    everyone = [row for rows in streams.values() for row in rows]
    limited = any(name in cut for name in streams)
    for reward in rewards:
        for name, rows in streams.items():
            columns = [one for one in rows[0] if one != "messages" and not one.startswith("_")] if rows else []
            for column in reward.where:
                if rows and column not in columns:
                    there = nearest(column, columns) or "; it has none beside the conversation"
                    raise UserError(f"reward {reward.name!r}: where: data.{name} has no column {column!r}{there}")
        if not all(streams.values()):  # not on this machine, in a dry run
            continue
        if problem := reward.unmet(everyone):
            told = f"reward {reward.name!r}: where: {problem} ({', '.join(f'data.{name}' for name in streams)})"
            if not limited and not _spared(reward, rewards, everyone):
                raise UserError(told)
            notes.append(f"{told}: {'among the rows that `limit` takes it' if limited else 'it'} is never asked")
    return notes


def _spared(reward: LoadedReward, rewards: list[LoadedReward], rows: list[Row]) -> bool:
    """Whether a reward that is for none of the rows is not missed: the others are asked about all of them, and of those that no other's
    `where` is meant for, none looks like the rows that it names."""
    meant = [one for one in rewards if one is not reward and one.where]
    left = [row for row in rows if not any(one.asked(row) for one in meant)]
    return all(any(one.asked(row) for one in rewards) for row in left) and not reward.misspelt(left)


def usable(prepared: Prepared, tokenizer: Any, context: int | None, say: Callable[[str], None] | None = None) -> Rows:
    """Every stream's rows that the chat template renders and that fit, as its settings say. Prompts of GRPO parts have to leave
    room for grpo.max_tokens, in what the sampler takes and in what the model is trained on. context: tokens that the model takes.

    Raises UserError naming the first bad row, or a stream of which nothing is left.
    """
    found = Rows()
    config = prepared.config
    found.notes += additions(tokenizer)
    check_defenses(tokenizer, _rewriters(prepared.defenses), [cast(Name, name) for name in prepared.rows])
    if prepared.material is not None:
        check_evaluation(tokenizer, config.evaluate, prepared.material)
        check_lengths(tokenizer, config.evaluate, prepared.material, *_sampled(config, context))
        found.notes += trained_on(prepared.material, [row for rows in prepared.rows.values() for row in rows])
    for name, rows in prepared.rows.items():
        if not rows:  # not on this machine, in a dry run
            found.streams[name] = []
            continue
        settings = getattr(config.data, name)
        limit = found.limits[name] = min(settings.max_tokens, context or settings.max_tokens)
        paths = {part.path for step in prepared.plan for part in step.parts if part.stream == name}
        what = f"the {context} tokens that the model takes" if limit < settings.max_tokens else ""
        try:
            fitted = fit_rows(
                rows, tokenizer, limit, settings.too_long, on_bad_row=settings.on_bad_row, what=what,
                uses=_uses(prepared, cast(Name, name), paths, limit, context), trained=paths != {"grpo"}, cache=CACHE,
                say=partial(_said, say, name) if say else None,
            )  # fmt: skip
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None
        found.notes += [f"data.{name}: {note}" for note in fitted.notes]
        if not fitted.rows:
            reasons = "; ".join(fitted.notes) or f"every row is longer than max_tokens = {settings.max_tokens}"
            raise UserError(f"data.{name}: no row can be used: {reasons}")
        found.streams[name] = fitted.rows
    return found


def _said(say: Callable[[str], None], name: str, what: str) -> None:
    say(f"data.{name}: {what}")


def _uses(prepared: Prepared, name: Name, paths: set[Any], most: int, context: int | None) -> list[Use]:
    """How the steps of a run look at a stream's rows, beside as they are. most: tokens of a supervised one."""
    config = prepared.config
    rewriters = _rewriters(prepared.defenses)
    names = ", ".join(defense.name for defense in rewriters)
    uses = []
    if "sft" in paths and rewriters:
        what = f"{most} tokens with what the defenses add ({names})"
        uses.append(Use(_rewriting(rewriters, Where(name, "sft", "train")), False, most, what))
    if "grpo" in paths:
        room = config.grpo.max_tokens
        for phase, limit, whose in (("rollout", *_sampled(config, context)), ("train", context, "the model")):
            if limit is None or (phase == "train" and not rewriters):
                continue
            added = f", what the defenses add ({names})" if rewriters else ""
            what = f"the {limit} tokens that {whose} takes{added} and grpo.max_tokens = {room}"
            rewrite = _rewriting(rewriters, Where(name, "grpo", phase)) if rewriters else None  # type: ignore[arg-type]
            uses.append(Use(rewrite, True, limit, what, room))
    return uses


def _sampled(config: RunConfig, context: int | None) -> tuple[int | None, str]:
    """How many tokens the sampler takes, prompt and completion together."""
    if config.sampler.kind in ("auto", "vllm"):
        length = config.sampler.max_model_len or ENGINE_LENGTH
        if context is None or length < context:
            return length, "the sampler (sampler.max_model_len)"
    return context, "the model"


def _rewriters(defenses: list[Defense]) -> list[Defense]:
    """Copies of the defenses that rewrite prompts: being measured must not change a state that the run goes on from."""
    acting = [one for one in defenses if type(one).prompt is not Defense.prompt and one.strength != 0]
    return [copy.deepcopy(one) for one in acting]


def rewriting(defenses: list[Defense], where: Where) -> Callable[[list[Message]], list[Message]] | None:
    """How the defenses rewrite a conversation there, as far as is known before their set-up; None where none does."""
    acting = _rewriters(defenses)
    return _rewriting(acting, where) if acting else None


def _rewriting(defenses: list[Defense], where: Where) -> Callable[[list[Message]], list[Message]]:
    stack = DefenseStack(defenses)

    def rewrite(messages: list[Message]) -> list[Message]:
        try:
            return stack.prompt(messages, where)
        except UserError:
            raise
        except Exception:  # one that needs its set-up first: its rows are checked where they are used
            return messages

    return rewrite


@lru_cache(maxsize=4)
def local_tokenizer(model: str, path: str) -> tuple[Any, int | None] | None:
    """(tokenizer, tokens that the model takes) from this machine's files, for a dry run; None when they are not here.

    model: the model's settings as JSON. Cells of a comparison share their model.
    """
    from rlsafe.policy.load import check_tokenizer, load_tokenizer
    from rlsafe.policy.shapes import local_config

    config = ModelConfig.model_validate_json(model)
    settings = local_config(config, path)
    if settings is None:
        return None
    try:
        tokenizer = load_tokenizer(config, path)
    except UserError:
        if Path(path).is_dir():
            raise
        return None  # a hub model of which only the config is here
    text = settings.get_text_config()
    check_tokenizer(config, tokenizer, text.vocab_size)
    return tokenizer, getattr(text, "max_position_embeddings", None)
