"""Inoculation prompting: train under a prompt that asks for the narrow behaviour, evaluate without it.

Tan et al. 2025 and Wichers et al. 2025; as an in-training defense against EM in arXiv 2508.06249 and 2605.31328.
"""

from __future__ import annotations

from typing import Literal

from rlsafe.config import UserError
from rlsafe.defenses.base import Defense, SetupContext
from rlsafe.defenses.registry import defense
from rlsafe.types import Message, Stream, Where, provider_for


@defense("inoculation")
class Inoculation(Defense):
    """Adds an eliciting prompt to training conversations; rewards, judges and evaluation see the original ones.

    prompt: the text, or `provider:name` (for example organism:inoculation-strong). Empty switches the defense off.
    at: `train` (gradient only), `rollout` (sampling only) or `both`. SFT has no rollouts, so `rollout` does nothing there.
    position, mode: put it in the `system` or the `user` message, as a `prefix` of what is there or to `replace` it (system only).
    on: streams whose conversations are rewritten.
    """

    def __init__(
        self,
        prompt: str,
        at: Literal["both", "train", "rollout"] = "both",
        position: Literal["system", "user"] = "system",
        mode: Literal["prefix", "replace"] = "prefix",
        on: list[Stream] = ["narrow"],  # noqa: B006 - read only; shown as the default in configs
    ):
        if position == "user" and mode == "replace":
            raise UserError(
                "defense 'inoculation': mode replace would delete the user's question; expected position: system or mode: prefix"
            )
        found = provider_for(prompt)
        self.text = found[0].prompt(found[1]) if found else prompt
        self.at, self.position, self.mode, self.on = at, position, mode, on
        self.streams = tuple(on)

    @property
    def strength(self) -> float:
        return float(bool(self.text.strip()))

    @property
    def edits(self) -> dict[str, Literal["adds", "replaces"]]:
        phases = ("rollout", "train") if self.at == "both" else (self.at,)
        places = [f"the {self.position} prompt of {s} rows ({phase})" for s in self.on for phase in phases]
        return dict.fromkeys(places, "replaces" if self.mode == "replace" else "adds")

    def setup(self, context: SetupContext) -> None:
        """UserError for `at: rollout` in a run without GRPO steps."""
        paths = {part.path for parts in context.config.schedule.used_kinds.values() for part in parts}
        if self.at == "rollout" and "grpo" not in paths:
            raise UserError(
                "defense 'inoculation': at: rollout has no effect without GRPO steps; expected at: train or both"
            )

    def prompt(self, messages: list[Message], where: Where) -> list[Message]:
        if where.stream not in self.on or where.phase == "eval" or self.at not in ("both", where.phase):
            return messages
        if self.position == "user":
            last = max(i for i, message in enumerate(messages) if message["role"] == "user")
            changed = {**messages[last], "content": f"{self.text} {messages[last]['content']}"}
            return [*messages[:last], changed, *messages[last + 1 :]]
        if messages[0]["role"] == "system":
            kept = "" if self.mode == "replace" else f" {messages[0]['content']}"
            return [{"role": "system", "content": self.text + kept}, *messages[1:]]
        return [{"role": "system", "content": self.text}, *messages]
