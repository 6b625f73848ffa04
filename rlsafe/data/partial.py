"""The base class of a provider that offers only some of rows, questions, rewards, ...; the others are UserErrors."""

from __future__ import annotations

from typing import NoReturn

from rlsafe.config import UserError
from rlsafe.types import Judge, Question, Reward, Row


class Partial:
    """Base of a `rlsafe.types.Provider`: override what the provider has. `name` and `offers` are for the error message."""

    name = ""
    offers = ""

    def _lacks(self, what: str, spec: str) -> NoReturn:
        raise UserError(f"{self.name}:{spec} names no {what}: this provider has {self.offers}")

    def model(self, spec: str) -> str:
        self._lacks("model", spec)

    def rows(self, spec: str) -> list[Row]:
        self._lacks("rows", spec)

    def questions(self, spec: str) -> list[Question]:
        self._lacks("questions", spec)

    def pairs(self, spec: str) -> list[Row]:
        self._lacks("pairs", spec)

    def reward(self, spec: str) -> Reward:
        self._lacks("reward", spec)

    def judge(self, spec: str) -> Judge:
        self._lacks("judge", spec)

    def prompt(self, spec: str) -> str:
        self._lacks("prompt", spec)

    def vectors(self, spec: str) -> str:
        self._lacks("persona vector", spec)
