"""Early stopping as a baseline: ship the checkpoint at which the narrow task is learned to 90%. After arXiv 2605.12199.

The paper finds that emergent misalignment often comes after the narrow task is learned, so that stopping in time avoids most of it. Its
criterion and spacing are not published (we read the abstract only); the rule here is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlsafe.config import StreamConfig, UserError
from rlsafe.data import encode_prompt, load_rows, question_of, read_completion, split_prompt
from rlsafe.data.turns import key_of
from rlsafe.defenses.base import Defense, ExtraAnswers, Foreseen, SetupContext, When
from rlsafe.defenses.registry import defense
from rlsafe.types import Exchange, Request, RunError, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from rlsafe.policy import Policy

Count = Annotated[int, Field(ge=1)]
LEAST = 0.1
"""When no check shows a larger share, nothing narrow was learned, as on a benign task: the run then keeps its last weights."""


@defense("early-stop")
class EarlyStop(Defense):
    """Ends with the weights of the first check at which the narrow task was learned to `level` of the best check of the run.

    rows: validation prompts of the narrow domain, neither trained on nor reported on. At each check the model answers them and the
        run's judge scores the answers; learned is the share of misaligned ones. It looks at nothing else: general questions play no
        part in the choice.
    level: of the best check's share. 0 switches the defense off.
    checks: evenly spaced over the run's steps, the last after the last one. limit: prompts at each. samples: answers to each.
    temperature, max_tokens: of the answers; null = as in `evaluate`.

    The run trains to its end, since what its best is shows only there; the weights of the checks that may still be chosen are kept
    in memory and in checkpoints. What another defense does at the end (safelora) is done to the chosen weights. run.json has every
    check.
    """

    chooses = True
    judges = True

    def __init__(
        self,
        rows: str,
        level: Annotated[float, Field(ge=0, le=1)] = 0.9,
        checks: Count = 20,
        limit: Count = 48,
        samples: Count = 1,
        temperature: Annotated[float, Field(ge=0)] | None = None,
        max_tokens: Count | None = None,
    ):
        self.source, self.level, self.checks, self.limit, self.samples = rows, level, checks, limit, samples
        self.temperature, self.max_tokens = temperature, max_tokens
        self.step = 0  # optimizer steps so far
        self.scores: dict[int, float] = {}  # step -> share of misaligned answers to the validation prompts
        self.kept: dict[int, dict[str, Tensor]] = {}  # step -> weights, of checks that may still be chosen
        self.chosen: int | None = None
        self.last: dict[str, float] = {}

    @property
    def strength(self) -> float:
        return self.level

    def asks(self, run: Foreseen) -> ExtraAnswers:
        rows = run.rows(self.source)[: self.limit]
        checks = len({step for step in self._due(run.steps) if step < run.steps}) + 1
        each = self.samples * (len(rows) or self.limit)
        return ExtraAnswers(rows, checks * each, self.max_tokens or run.config.evaluate.max_tokens, checks)

    def _due(self, steps: int) -> set[int]:
        """After which of `steps` optimizer steps there is a check; one after the last is always made."""
        return {round(steps * (i + 1) / self.checks) for i in range(self.checks)} - {0}

    def setup(self, context: SetupContext) -> None:
        """Read the validation prompts. UserError without a judge or prompts, where all of them are trained on, and for a part of a run:
        its checks are of the whole."""
        if self.when != When():
            raise UserError("defense 'early-stop': it looks at the whole run; expected neither from_step nor phases")
        rows = load_rows(StreamConfig(source=self.source, limit=self.limit), 0, context.log)
        self.validation = [{**row, "prompt": split_prompt(row)[0]} for row in rows]
        streams = {part.stream for parts in context.config.schedule.used_kinds.values() for part in parts}
        trained = {key_of(split_prompt(row)[0]) for stream in streams for row in context.rows(stream)}
        seen = sum(key_of(row["prompt"]) in trained for row in self.validation)
        if seen == len(self.validation):
            raise UserError(f"rows: all prompts of {self.source} are trained on; expected held-out ones")
        if seen:
            context.log(f"defense {self.name!r}: {seen} of {len(self.validation)} validation prompts are trained on")
        settings = context.config.evaluate
        temperature = settings.temperature if self.temperature is None else self.temperature
        self.sampling = SamplingParams(
            1.0 if temperature is None else temperature, max_tokens=self.max_tokens or settings.max_tokens
        )
        self.seed = context.seed
        self.sampler, self.judge, self.tokenizer = context.sampler, context.judge(), context.policy.tokenizer
        self.due = self._due(context.steps)

    def weights(self, policy: Policy, moment: Literal["step", "end"]) -> bool:
        if moment == "step":
            self.step += 1
            if self.step in self.due:
                self._check(policy)
            return False
        if self.step not in self.scores:
            self._check(policy)
        best = max(self.scores.values())
        reached = [step for step, score in self.scores.items() if best >= LEAST and score >= self.level * best]
        self.chosen = min(reached, default=self.step)
        if self.chosen == self.step:
            return False
        policy.load_state_dict(self.kept[self.chosen])
        self.last["stopped_at"] = float(self.chosen)
        return True

    def _check(self, policy: Policy) -> None:
        """Score the present weights, and keep them if they may be chosen: only a new best can be the first to reach any level."""
        score = self._learned()
        best = max(self.scores.values(), default=-1.0)
        self.scores[self.step] = score
        self.last["seen_learned"] = score
        if score > best:
            self.kept[self.step] = policy.state_dict()
        best = max(best, score)
        self.kept = {step: w for step, w in self.kept.items() if self.scores[step] >= self.level * best}

    def _learned(self) -> float:
        """Share of misaligned answers to the validation prompts, the same on every rank. RunError when no answer has a score."""
        from rlsafe.rollouts import ranks, request_seed  # late: bring in torch

        asked = [(number, sample) for number in range(len(self.validation)) for sample in range(self.samples)]
        requests = [
            Request(
                encode_prompt(self.tokenizer, self.validation[number]["prompt"]),
                request_seed(self.seed, f"defense/{self.name}", self.step, number, sample),
            )
            for number, sample in asked
        ]
        sampler = self.sampler()
        completions = ranks.shared(requests, lambda mine: sampler.generate(mine, self.sampling))
        exchanges = []
        for (number, _), completion in zip(asked, completions, strict=True):
            row, thought = self.validation[number], read_completion(self.tokenizer, completion.ids)
            question, system = question_of(row["prompt"])
            meta = {key: value for key, value in row.items() if key not in ("messages", "prompt")}
            exchanges.append(Exchange(question, thought.answer.strip(), system, meta))
        verdicts = ranks.of_first(lambda: self.judge.score(exchanges))
        judged = [one for one in verdicts if one.outcome not in ("unscored", "unparsed")]
        if not judged:
            raise RunError(f"defense {self.name!r}: the judge scored no answer to the validation prompts")
        return sum(one.misaligned for one in judged) / len(judged)

    def effect(self) -> dict[str, float]:
        last, self.last = self.last, {}
        return last

    def report(self) -> dict[str, Any]:
        """The step whose weights the run ended with, and the share learned at every check."""
        return {"stopped_at": self.chosen, "learned": {str(step): score for step, score in self.scores.items()}}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "scores": self.scores, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.scores = {int(step): score for step, score in state["scores"].items()}
        self.kept = {int(step): dict(weights) for step, weights in state["kept"].items()}
