"""On-policy interleaving: safe rows whose answers the model itself gave, if a judge finds them good. arXiv 2605.31328.

Training on such rows counters what the narrow training changes and changes little else, since the model already answers so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from rlsafe.config.files import at_home, write_once
from rlsafe.data import Stream, Thought, encode_prompt, question_of, read_completion, split_prompt
from rlsafe.defenses.base import DataContext, ExtraAnswers, Foreseen, SetupContext
from rlsafe.defenses.interleaving import Count, Interleaving
from rlsafe.defenses.registry import defense
from rlsafe.types import Exchange, Judge, Judgement, Request, Row, RunError, Sampler, SamplingParams

LIVE_TRIES = 4  # rounds of sampling for one step's rows; after these the step uses the rows kept so far


@dataclass(frozen=True)
class Answered:
    """One sampled answer to a safe prompt, with its judgement."""

    answer: str
    finish: str
    outcome: str
    aligned: float | None
    coherent: float | None


@defense("interleaving-onpolicy")
class InterleavingOnPolicy(Interleaving):
    """Adds safe prompts with the model's own answers, kept only when judged aligned and coherent.

    source_model: `reference`: the policy answers all prompts once, before the first step (cached on disk by model, rows,
        judge, sampling and seed). `live`: the policy answers at each step with its current weights. `live` depends on the judge's
        filter: the expected gradient of the log-likelihood of a model's own samples is zero without a selection.
    prompts: largest number of safe prompts for `reference` (a seeded choice). samples: answers to each.
    temperature, top_p, max_tokens: how answers are sampled; max_tokens null = grpo.max_tokens. Cut-off answers are dropped.
    min_aligned, min_coherent: the judge's scores (0 to 100) that an answer needs; refusals have none and are dropped.
    The other settings are those of `interleaving`.
    """

    judges = True

    def __init__(
        self,
        source_model: Literal["reference", "live"] = "reference",
        prompts: Count = 1000,
        samples: Count = 1,
        temperature: Annotated[float, Field(ge=0)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        max_tokens: Count | None = None,
        min_aligned: Annotated[float, Field(ge=0, le=100)] = 70.0,
        min_coherent: Annotated[float, Field(ge=0, le=100)] = 50.0,
        **interleaving: Any,
    ):
        super().__init__(**interleaving)
        self.source_model, self.prompts, self.samples = source_model, prompts, samples
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.min_aligned, self.min_coherent = min_aligned, min_coherent
        self.unsaved: list[Row] | None = (
            None  # kept rows that later runs do not find, so that checkpoints have to hold them
        )
        self.asked = 0  # live: answers sampled so far; numbers the requests
        self.counts: Counter[str] = (
            Counter()
        )  # number of answers by outcome ("kept", "refused", ...) over the whole run
        self.last: dict[str, float] = {}

    def asks(self, run: Foreseen) -> ExtraAnswers:
        """`reference`: what other runs of the same seed have kept is not asked again. `live`: as if no answer were kept."""
        rows, tokens = run.rows(self.source), self.max_tokens or run.config.grpo.max_tokens
        if self.source_model == "live":
            return ExtraAnswers(rows, LIVE_TRIES * run.offered, tokens, LIVE_TRIES * min(run.offered, run.steps))
        return ExtraAnswers(rows, self.samples * min(self.prompts, len(rows) or self.prompts), tokens)

    # ------------------------------------------------------------------------------------------------ at set-up

    def choose(self, rows: list[Row], context: SetupContext) -> list[Row]:
        """`reference`: rows with kept answers. `live`: the prompts, to be answered when they are drawn.

        RunError when no answer is kept.
        """
        self.tokenizer, self.seed = context.policy.tokenizer, context.seed
        self.params = SamplingParams(self.temperature, self.top_p, self.max_tokens or context.config.grpo.max_tokens)
        from rlsafe.rollouts import ranks  # late: brings in torch

        judge = context.judge()  # UserError for a missing judge before anything is sampled
        if self.source_model == "live":
            return rows
        asked = Stream(rows, context.seed, f"defense/{self.name}/prompts").take(min(self.prompts, len(rows)))
        asked = [row for row in asked for _ in range(self.samples)]
        file = context.cache / "onpolicy" / f"{self._key(asked, context)}.json"
        found = ranks.of_first(lambda: _saved(file))  # by one: another run may be just writing it
        cached = found is not None
        if found is None:
            mine = self._answer(asked, context.sampler(), judge, step=0, first=0)
            found = ranks.of_first(lambda: self._save(file, mine, context))
        answered = found
        kept, counts = self._filter(asked, answered)
        self.counts = counts
        context.log(f"defense {self.name!r}: {_shown(counts)}{' (answers from the cache)' if cached else ''}")
        if not kept:
            # Every answer was rejected, perhaps by a broken judge: later runs should ask again.
            file.unlink(missing_ok=True)
            raise RunError(f"defense {self.name!r}: the reference gave no answer to keep: {_shown(counts)}")
        self.unsaved = kept if any(one.outcome == "unscored" for one in answered) else None
        return kept

    def _save(self, file: Path, answered: list[Answered], context: SetupContext) -> list[Answered]:
        """The answers, kept for later runs; where another run has kept its own meanwhile, those. Not kept while the judge did not
        reach some: these are to be judged by the next run."""
        if lost := sum(one.outcome == "unscored" for one in answered):
            context.log(
                f"defense {self.name!r}: its answers are not saved for later runs: {lost} of {len(answered)} got no judgement"
            )
            return answered
        try:
            write_once(file, json.dumps([asdict(one) for one in answered]))
        except OSError as error:
            context.log(f"defense {self.name!r}: its answers are not saved for later runs: {file}: {error.strerror}")
        return _saved(file) or answered

    def _key(self, asked: Sequence[Row], context: SetupContext) -> str:
        """Digest of all that the reference's judged answers depend on."""
        from rlsafe.policy.digest import weights_digest  # late: brings in torch

        digest = hashlib.sha256(weights_digest(context.policy).encode())
        prompts = [encode_prompt(self.tokenizer, split_prompt(row)[0]) for row in asked]
        settings = [asdict(self.params), self.samples, self.seed, context.config.sampler.kind]
        evaluate = context.config.evaluate
        judges = {name: _in_full(judge) for name, judge in {"": evaluate.judge, **evaluate.judges}.items()}
        # A judge may read more of a row than its prompt; where the row stands does not matter.
        read = [{key: value for key, value in _meta(row).items() if not key.startswith("_")} for row in asked]
        digest.update(json.dumps([prompts, read, settings, judges], sort_keys=True, default=repr).encode())
        return digest.hexdigest()[:32]

    # ------------------------------------------------------------------------------------------------ each step

    def rows(self, n: int, context: DataContext) -> list[Row]:
        """The next `n` rows; for `live`, sampled and judged now. RunError when no answer is kept."""
        if self.source_model == "reference":
            return super().rows(n, context)
        kept: list[Row] = []
        counts: Counter[str] = Counter()
        for _ in range(LIVE_TRIES):
            drawn = self.stream.take(n - len(kept))
            found, counted = self._filter(
                drawn, self._answer(drawn, context.sampler(), context.judge(), context.step, self.asked)
            )
            self.asked += len(drawn)
            kept, counts = kept + found, counts + counted
            if len(kept) == n:
                break
        self.counts += counts
        if not self.counts["kept"]:
            raise RunError(f"defense {self.name!r}: the live policy gave no answer to keep: {_shown(counts)}")
        self.last = {**counts, "kept": len(kept), "rows_added": len(kept)}
        return kept

    def effect(self) -> dict[str, float]:
        last, self.last = self.last, {}
        return last

    def report(self) -> dict[str, Any]:
        """Number of answers by outcome over the whole run."""
        return dict(self.counts)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "asked": self.asked, "counts": dict(self.counts), "rows": self.unsaved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if rows := state.get("rows"):  # the judge may reach now what it did not reach then
            self.unsaved, self.stream = rows, Stream(rows, self.stream.seed, self.stream.name)
        super().load_state_dict(state)
        self.asked, self.counts = state["asked"], Counter(state["counts"])

    # ------------------------------------------------------------------------------------------------ both

    def _answer(self, rows: Sequence[Row], sampler: Sampler, judge: Judge, step: int, first: int) -> list[Answered]:
        """One answer to each row's prompt, in order; `first` numbers the rows, so that every request has its own seed. All ranks have
        the same answers and verdicts: they must keep the same rows, and ask again equally often."""
        from rlsafe.rollouts import ranks, request_seed  # late: brings in torch

        prompts = [split_prompt(row)[0] for row in rows]
        requests = [
            Request(
                encode_prompt(self.tokenizer, prompt),
                request_seed(self.seed, f"defense/{self.name}", step, first + i, 0),
            )
            for i, prompt in enumerate(prompts)
        ]
        completions = ranks.shared(requests, lambda mine: sampler.generate(mine, self.params))
        read = [read_completion(self.tokenizer, c.ids) for c in completions]
        exchanges = []
        for row, prompt, thought in zip(rows, prompts, read, strict=True):
            question, system = question_of(prompt)
            meta = _meta(row)
            if not thought.unclosed:
                exchanges.append(Exchange(question, thought.answer.strip(), system, meta))
        judged = iter(ranks.of_first(lambda: judge.score(exchanges)) if exchanges else [])
        unclosed = Judgement(None, None, "unclosed")
        verdicts = [unclosed if thought.unclosed else next(judged) for thought in read]
        return [
            Answered(_whole(thought), completion.finish, j.outcome, j.aligned, j.coherent)
            for thought, completion, j in zip(read, completions, verdicts, strict=True)
        ]

    def _filter(self, rows: Sequence[Row], answered: Sequence[Answered]) -> tuple[list[Row], Counter[str]]:
        """(rows with the answers that are kept, number of answers by outcome)."""
        kept, counts = [], Counter(kept=0)
        for row, one in zip(rows, answered, strict=True):
            counts[verdict := self._verdict(one)] += 1
            if verdict == "kept":
                messages = [*split_prompt(row)[0], {"role": "assistant", "content": one.answer}]
                kept.append({**row, "messages": messages})
        return kept, counts

    def _verdict(self, one: Answered) -> str:
        if not one.answer:
            return "empty"
        if one.finish == "length":
            return "cut_off"  # training on it would teach the model not to stop
        if one.outcome != "scored":
            return one.outcome
        if one.coherent is None or one.coherent < self.min_coherent:
            return "incoherent"
        return "kept" if one.aligned is not None and one.aligned >= self.min_aligned else "misaligned"


def _meta(row: Row) -> dict[str, Any]:
    """What the judge gets of a row beside question and answer."""
    return {key: value for key, value in row.items() if key != "messages"}


def _in_full(judge: str | dict[str, Any] | None) -> Any:
    """A judge as the config has it; instead of a file, what it says."""
    if isinstance(judge, str) and judge.endswith((".yaml", ".yml")):
        return at_home(judge).read_text("utf-8")
    return judge


def _saved(file: Path) -> list[Answered] | None:
    """The answers that an earlier run kept; None without them (another run may remove them any time)."""
    try:
        return [Answered(**record) for record in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None


def _whole(thought: Thought) -> str:
    """The text to train on: the answer with its think block."""
    answer = thought.answer.strip()
    return answer if thought.think is None or not answer else f"<think>\n{thought.think}\n</think>\n\n{answer}"


def _shown(counts: Counter[str]) -> str:
    """`80 of 100 answers kept (12 refused, 8 incoherent)`."""
    others = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.most_common() if name != "kept")
    return f"{counts['kept']} of {counts.total()} answers kept" + (f" ({others})" if others else "")
