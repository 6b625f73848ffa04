"""Several judges at once, each for its own question set: `evaluate.judges: {general: ..., indomain: static}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from rlsafe.config import UserError, nearest
from rlsafe.evaluate.ask.cues import asks_the_general
from rlsafe.types import BackgroundJudge, Exchange, Judge, Judgement

NOBODY = Judgement(None, None, "unscored", "no judge is set for this question set")


class Panel:
    """`rlsafe.types.BackgroundJudge` that hands each exchange to the judge of its set (`meta["set"]`).

    judges: set -> judge. The general questions under a cue, and by a scaled adapter, are judged as the general ones. rest: judges
    what has no judge of its own, or None. each: all of them, once.
    """

    def __init__(self, judges: Mapping[str, Judge], rest: Judge | None):
        self.judges, self.rest = dict(judges), rest
        named = [*((f"{name}: ", judge) for name, judge in self.judges.items()), *([("", rest)] if rest else [])]
        self.name = ", ".join(prefix + judge.name for prefix, judge in named)
        self.each = list({id(judge): judge for _, judge in named}.values())

    def judge_of(self, name: str) -> Judge | None:
        """The judge of a question set; probes ask the same sets."""
        name = name.removeprefix("probe/")
        if name not in self.judges and asks_the_general(name):
            name = "general"
        return self.judges.get(name, self.rest)

    def require(self, names: Sequence[str]) -> None:
        """UserError for a set that is asked without a judge, or a judge of a set that is not asked."""
        for name in names:
            if self.judge_of(name) is None:
                raise UserError(f"evaluate.judges: none for the set {name!r}; add {name}: JUDGE, or set evaluate.judge")
        for name in self.judges:
            if name not in names:
                raise UserError(f"evaluate.judges: no question set {name!r} is asked{nearest(name, names)}")

    def score(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        return self.submit(exchanges).result()

    def submit(self, exchanges: Sequence[Exchange]) -> Future[list[Judgement]]:
        """Those that work in the background go on doing so; the others have judged when this returns."""
        found: Future[list[Judgement]] = Future()
        parts: list[tuple[list[int], Future[list[Judgement]]]] = []
        judgements = [NOBODY] * len(exchanges)
        for judge in self.each:
            places = [i for i, e in enumerate(exchanges) if self.judge_of(str(e.meta.get("set", ""))) is judge]
            chosen = [exchanges[i] for i in places]
            if isinstance(judge, BackgroundJudge) and chosen:
                parts.append((places, judge.submit(chosen)))
            elif chosen:
                for place, judgement in zip(places, judge.score(chosen), strict=True):
                    judgements[place] = judgement
        waiting = len(parts)
        if not waiting:
            found.set_result(judgements)

        def arrived(places: list[int], part: Future[list[Judgement]]) -> None:
            nonlocal waiting
            if error := part.exception():
                if not found.done():
                    found.set_exception(error)
                return
            for place, judgement in zip(places, part.result(), strict=True):
                judgements[place] = judgement
            waiting -= 1
            if not waiting and not found.done():
                found.set_result(judgements)

        for places, part in parts:
            part.add_done_callback(partial(arrived, places))
        return found

    # ------------------------------------------------------------------------------------------------ as one judge

    @property
    def _background(self) -> list[BackgroundJudge]:
        return [judge for judge in self.each if isinstance(judge, BackgroundJudge)]

    @property
    def paused(self) -> bool:
        return any(judge.paused for judge in self._background)

    @property
    def gave_up(self) -> str | None:
        return next((judge.gave_up for judge in self._background if judge.gave_up), None)

    def check(self, first: bool = False, asked: Sequence[Exchange] | None = None) -> None:
        for judge in self._background:
            own = None if asked is None else [e for e in asked if self.judge_of(str(e.meta.get("set", ""))) is judge]
            judge.check(first, own)

    def usage(self) -> dict[str, Any]:
        return {judge.name: judge.usage() for judge in self._background}

    def summary(self) -> str:
        return "; ".join(judge.summary() for judge in self._background) or f"judges {self.name}: no calls"
