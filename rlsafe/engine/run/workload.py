"""What a run will do, counted from its plan before it is made: tokens, completions, answers, judgements, and the load of a CPU.

All that samples, judges or passes tokens through the model is counted here or, for what a defense does besides the rollouts, in its
`asks`. Tests hold the counts against runs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlsafe.config import EvaluateConfig
from rlsafe.data import split_prompt
from rlsafe.defenses import DefenseStack
from rlsafe.defenses.base import ExtraAnswers, Foreseen
from rlsafe.engine.plan.schedule import PlannedPart, Step
from rlsafe.engine.plan.timing import Load, sampling, shown
from rlsafe.engine.run.build import Prepared
from rlsafe.engine.run.lengths import Lengths, some
from rlsafe.evaluate import Estimate, load_judge, load_pair_sets
from rlsafe.evaluate.ask.cues import PREFIX
from rlsafe.evaluate.commands.costs import Asked, of_evaluation, of_exchanges, of_probe
from rlsafe.evaluate.measure.fluency import MOST
from rlsafe.types import Exchange, Where


@dataclass
class Work:
    """What a run trains on, samples and has judged. answers: of the evaluation and the probes, benign and held-out ones too. asked: by
    defense, further answers at most. penalty_tokens: of rows that only a penalty sees."""

    steps: int = 0
    sft_tokens: float = 0.0
    penalty_tokens: float = 0.0
    completions: int = 0
    completion_tokens: int = 0
    answers: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    judging: Estimate = field(default_factory=Estimate)
    graders: set[str] = field(default_factory=set)
    further: int = 0  # completions at most for groups without spread (grpo.resample)
    seconds: tuple[float, float] = (0.0, 0.0)  # on this CPU: of training, of sampling and scoring; zeros where unknown

    @property
    def samples(self) -> bool:
        """Whether the run needs a sampler at all."""
        return bool(self.answers or self.completions or self.asked)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps, self.sft_tokens + other.sft_tokens, self.penalty_tokens + other.penalty_tokens,
            self.completions + other.completions, self.completion_tokens + other.completion_tokens,
            self.answers + other.answers, self.asked + other.asked, self.judging + other.judging,
            self.graders | other.graders, self.further + other.further,
            (self.seconds[0] + other.seconds[0], self.seconds[1] + other.seconds[1]),
        )  # fmt: skip

    def lines(self, jobs: int = 1) -> list[str]:
        """What there is to do, for people: steps, training, rewards, answers, judging, time where `jobs` runs go on at a time."""
        trained = [f"about {short(self.sft_tokens)} tokens by supervision"] if self.sft_tokens else []
        trained += [f"{short(self.penalty_tokens)} by penalties alone"] if self.penalty_tokens else []
        if self.completions:
            most = f"at most {short(self.completion_tokens)} tokens"
            trained.append(f"{self.completions:,} completions ({most}) by reward")
        lines = [f"steps: {self.steps:,}", "training: " + (", ".join(trained) or "nothing")]
        if self.further:
            lines.append(f"grpo.resample: at most {self.further:,} completions more, for groups without spread")
        if self.completions:
            lines.append(f"rewards: {', '.join(sorted(self.graders))} (a model that grades is asked once a completion)")
        lines.append(f"evaluation and probes: {self.answers:,} answers")
        if self.asked:
            of_each = ", ".join(f"{name} {count:,}" for name, count in sorted(self.asked.items()))
            lines.append(f"defenses: at most {self.asked.total():,} answers more ({of_each})")
        lines += self.judging.lines()
        if sum(self.seconds):
            training, sampling = (part / jobs for part in self.seconds)
            lines.append(
                f"time on this CPU: about {shown(training + sampling)}, training {shown(training)}, sampling and scoring "
                f"{shown(sampling)} ({f'{jobs} runs at a time, ' if jobs > 1 else ''}as busy as it is now; graders not counted)"
            )
        return lines


def workload(prepared: Prepared, evaluate: EvaluateConfig) -> tuple[Work, Load]:
    """What the run comes to. evaluate: its evaluation settings, without what is not on this machine.

    Not counted: the self-test of the sampler (seconds), and the untrained model's half of the pairs, which all runs but the first find
    saved. Rows of a defense's own source are read; UserError when that cannot be done and the source is no remote one.
    """
    return _Counting(prepared, evaluate).result()


class _Counting:
    """One run's counts as they add up."""

    def __init__(self, prepared: Prepared, evaluate: EvaluateConfig):
        self.config, self.plan, self.prepared, self.evaluate = prepared.config, prepared.plan, prepared, evaluate
        self.stack = DefenseStack(prepared.defenses)
        self.named = {defense.name: defense for defense in self.stack}
        self.lengths = Lengths(prepared)
        self.work = Work(steps=len(self.plan), graders=set(prepared.rewards.rewards) if prepared.rewards else set())
        self.sums: dict[str, float] = defaultdict(float)  # of Load
        self.load = Load()
        self.versions: set[int] = set()  # numbers of optimizer steps after which the sampler is given weights
        self.offered: Counter[str] = Counter()
        self.judged: Asked = []

    def result(self) -> tuple[Work, Load]:
        left: dict[str, int] = {}  # place -> further steps that its rollouts teach, as in `grpo_step`
        for step in self.plan:
            self._train(step, left)
        self._defenses()
        if self.prepared.material is not None:
            self._probes()
            self._evaluation()
        settings, material = self.config.evaluate, self.prepared.material
        if self.judged and settings.judged:
            judge = (material and material.judge) or load_judge(settings.judge, settings.judges)
            self.work.judging = of_exchanges(self.judged, judge)
        sampled = self.load.decoded > 0
        self.sums["syncs"] += len(self.versions)
        sums = Load(**self.sums, runs=1, engines=float(sampled))
        return self.work, self.load + sums

    # ------------------------------------------------------------------------------------------------ training

    def _train(self, step: Step, left: dict[str, int]) -> None:
        self.stack.begin(step.index, step.phase)
        seen: list[tuple[float, float]] = []  # (tokens, of them answers) of each part
        for part in step.parts:
            if part.path == "grpo":
                seen.append(self._rewarded(step, part, left))
                continue
            tokens, answers = (part.rows * mean for mean in self.lengths.of_rows(part, self.named))
            self.offered[part.defense or ""] += part.rows
            if part.stream == "aside":
                self.work.penalty_tokens += tokens
            else:
                self.work.sft_tokens += tokens
            seen.append((tokens, answers))
        most = self.config.batch.micro_tokens
        micros = sum(max(1.0, tokens / most) for tokens, _ in seen)
        total = sum(tokens for tokens, _ in seen)
        needs = self.stack.needs
        references = {need.reference for need in needs if need.reference}
        if self.config.grpo.beta and step.path == "grpo":
            references.add(self.config.grpo.reference)
        compared = [need for need in needs if need.kind == "divergence"]
        if compared:
            everywhere = any(need.mask == "all" for need in compared)
            self.sums["compared"] += len(compared) * sum(tokens if everywhere else answers for tokens, answers in seen)
        self.sums["trained"] += total
        self.sums["forwarded"] += len(references) * total
        self.sums["passes"] += (3 + len(references)) * micros
        self._backward_again(step, seen)

    def _backward_again(self, step: Step, seen: Sequence[tuple[float, float]]) -> None:
        """Parts of the gradient are had apart by further backward passes: to measure the shares of penalties (of one micro-batch, in
        the first two steps and at probes), and where a defense changes or scales them."""
        penalized = self.stack.penalized
        every = self.config.track.every
        if penalized and seen and (step.index < 2 or (every and step.index % every == 0)):
            self.sums["again"] += (1 + len(penalized)) * min(seen[0][0], self.config.batch.micro_tokens)
        aside = {part.defense for part in step.parts if part.stream == "aside"}
        apart = [one for one in penalized if one.name in self.stack.own - aside]
        self.sums["again"] += len(apart) * sum(tokens for tokens, _ in seen)

    def _rewarded(self, step: Step, part: PlannedPart, left: dict[str, int]) -> tuple[float, float]:
        """A part's rollouts, unless an earlier step of its kind has made them; gives what it trains on."""
        grpo, place = self.config.grpo, part.place
        completions = part.rows * grpo.generations
        length = self.lengths.answer(part.stream, grpo.max_tokens)
        prompt, trained_prompt = (self.lengths.prompt(part.stream, phase) for phase in ("rollout", "train"))
        tokens = completions * (trained_prompt + length)
        if left.get(place):
            left[place] -= 1
            return tokens, completions * length
        left[place] = grpo.iterations - 1
        self.versions.add(step.index)
        self.work.completions += completions
        self.work.completion_tokens += completions * grpo.max_tokens
        self.work.further += grpo.resample * grpo.generations
        self.load += self._sampled(completions, prompt / grpo.generations, length, grpo.max_tokens)
        before = int(grpo.iterations > 1 or grpo.max_staleness > 0)
        at = Where(part.stream, "grpo", "train"), Where(part.stream, "grpo", "rollout")
        before += trained_prompt != prompt or self.stack.steers_differently(*at)  # the sampler saw another context
        self._read(before * tokens)
        return tokens, completions * length

    # ------------------------------------------------------------------------------------------------ answers

    def _defenses(self) -> None:
        for defense in self.stack:
            run = Foreseen(
                self.config, self.lengths.rows, self.offered[defense.name], self.work.completions + self.work.further,
                len(self.plan),
            )  # fmt: skip
            asked = defense.asks(run)
            if asked is None or not asked.answers:
                continue
            prompt, length = self.lengths.prompts(asked.rows), self.lengths.answer("narrow", asked.tokens)
            if asked.calls:
                self.work.asked[defense.name] += asked.answers
                self.load += self._sampled(asked.answers, prompt, length, asked.tokens, asked.calls)
                self.sums["syncs"] += asked.calls if asked.calls > 1 else 0
            elif not asked.judged:
                self._read(asked.answers * (prompt + length), asked.answers)
            self.judged += _spread(asked) if asked.judged else []

    def _probes(self) -> None:
        material, every = self.prepared.material, self.config.track.every
        at = [step.index for step in self.plan if every and (step.index % every == 0 or step is self.plan[-1])]
        assert material is not None
        if not at:
            return
        asked = [(exchange, len(at) * count, most) for exchange, count, most in of_probe(self.config, material)]
        answers, length = sum(count for _, count, _ in asked), self._answer
        self.work.answers += answers
        self.judged += asked
        prompt = self.lengths.questions(exchange for exchange, *_ in asked)
        self.load += self._sampled(answers, prompt, length, self.evaluate.max_tokens, len(at))
        self._read(2 * answers * (prompt + length), 4 * len(at) if answers else 0)  # KL to the base
        self.versions |= {index + 1 for index in at} if answers else set()
        self._pairs(len(at), self.config.track.pairs)

    def _evaluation(self) -> None:
        material, evaluate, length = self.prepared.material, self.evaluate, self._answer
        assert material is not None
        asked = of_evaluation(evaluate, material)
        judged, benign = sum(count for _, count, _ in asked), sum(map(len, material.tasks.values()))
        narrow = material.narrow.rows if material.narrow else []
        held_out = 2 * material.narrow.settings.samples * len(narrow) if material.narrow else 0
        self.work.answers += judged + benign + held_out  # held-out prompts: of this model and of the untrained one
        self.judged += asked
        rows = [row for task in material.tasks.values() for row in task] + narrow
        prompt = self.lengths.questions(exchange for exchange, *_ in asked)
        at_once = 1 + len(evaluate.scale) + bool(held_out)
        self.load += self._sampled(judged, prompt, length, evaluate.max_tokens, at_once if judged else 1)
        self.load += self._sampled(benign + held_out, self.lengths.prompts(rows), length, evaluate.max_tokens)
        self.sums["syncs"] += 1 + (len(evaluate.scale) + 1 if evaluate.scale else 0) + (2 if held_out else 0)
        if evaluate.fluency:
            sets: Counter[str] = Counter()
            for exchange, count, _ in asked:
                sets[exchange.meta["set"]] += count
            self._read(sum(min(n, MOST) for name, n in sets.items() if not name.startswith(PREFIX)) * (prompt + length))
        self._pairs(1, None)

    @property
    def _answer(self) -> float:
        return self.lengths.answer("narrow", self.evaluate.max_tokens)

    def _pairs(self, times: int, most: int | None) -> None:
        material = self.prepared.material
        if material is None or not material.pairs:
            return
        pairs = [
            pair for mine in (load_pair_sets(self.evaluate, most) if most else material.pairs).values() for pair in mine
        ]
        both = [conversation for pair in some(pairs) for conversation in pair.conversations()]
        self._read(2 * times * len(pairs) * self.lengths.mean(both), 2.0 * times)

    def _sampled(self, answers: int, prompt: float, length: float, longest: float, calls: int = 1) -> Load:
        return sampling(answers, prompt, length, longest, self.config.sampler.max_num_seqs, calls)

    def _read(self, tokens: float, passes: float = 1.0) -> None:
        """Tokens passed through the model without gradient."""
        self.sums["forwarded"] += tokens
        self.sums["passes"] += max(passes, tokens / self.config.batch.micro_tokens) if tokens else 0.0


def _spread(asked: ExtraAnswers) -> Asked:
    """The exchanges that a defense has judged, its rows' prompts in equal parts; of a guessed length where the rows are not here."""
    texts = [split_prompt(row)[0][-1]["content"] for row in some(asked.rows)] or ["?" * 200]
    each, more = divmod(asked.answers, len(texts))
    return [(Exchange(text, ""), each + (number < more), asked.tokens) for number, text in enumerate(texts)]


def short(count: float) -> str:
    """12300 -> 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"
