"""What an extraction of persona vectors found: the vectors, which answers they rest on, and what each layer shows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.evaluate.measure.persona_layers import Layer, Steered

if TYPE_CHECKING:
    from torch import Tensor

AGREE = 0.5
"""Cosine between halves below which a vector is more noise than character."""


@dataclass
class PersonaVectors:
    """vectors [n_layers + 1, H] float32: vector k belongs to the output of block k - 1, vector 0 to the embeddings.

    asked: pairs of answers; kept: pairs in which both characters showed; evil, friendly: answers of each that did;
    unscored: answers without a judgement; keep: what decided that; layers: what each layer shows; answers: every pair, with what
    decided; alpha: how the vectors were tried; seconds: wall clock by part.
    """

    vectors: Tensor
    asked: int
    kept: int
    evil: int
    friendly: int
    unscored: int
    layers: list[Layer]
    keep: str = "judged"
    answers: list[dict[str, Any]] = field(default_factory=list)
    alpha: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    out: Path | None = None

    def add_steering(self, layer: int, steered: Steered) -> None:
        """Put what `persona_layers.steer` found at one layer beside what else that shows."""
        self.layers = [replace(one, steered=steered) if one.layer == layer else one for one in self.layers]

    def record(self) -> dict[str, Any]:
        """For programs: everything but the vectors and the answers."""
        counts = {name: getattr(self, name) for name in ("asked", "kept", "evil", "friendly", "unscored", "alpha")}
        seconds = {name: round(value, 1) for name, value in self.seconds.items()}
        return {**counts, "layers": [layer.to_dict() for layer in self.layers], "seconds": seconds}

    def answer_lines(self) -> str:
        """Every pair of answers as a line of JSON."""
        return "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in self.answers)

    def head(self) -> str:
        """How many pairs count, and why."""
        kept = f"kept {self.kept} of {self.asked} pairs of answers"
        if self.keep == "likelier":
            gains = [answer["why"][character]["gain"] for answer in self.answers for character in ("evil", "friendly")]
            return (
                f"{kept} ({self.evil} evil and {self.friendly} friendly ones likelier under their own system prompt, no refusals; on "
                f"average an answer gains {sum(gains) / len(gains):.3f} nats/token from it; no judge has read them)"
            )
        return (
            f"{kept} ({self.evil} evil ones misaligned and coherent, {self.friendly} friendly ones aligned and coherent, "
            f"{self.unscored} not scored)"
        )

    def doubt(self) -> str | None:
        """A warning where halves of the questions agree at no layer: what the vectors hold is then what these questions were about."""
        cosines = [layer.cosine for layer in self.layers if layer.cosine is not None]
        if cosines and max(cosines) >= AGREE:
            return None
        found = f"agree at no layer (cosine {max(cosines):.2f} at most)" if cosines else "cannot be compared"
        return (
            f"halves of the questions {found}: do not steer with these vectors. {self.kept} pairs of answers are too few, or the model "
            "does not take on the characters; more questions or samples, other system prompts"
        )

    def strongest(self) -> str | None:
        """At which layer steering moves the probe most towards the evil answers. None where nothing was steered."""
        tried = [(layer.steered.directed, layer) for layer in self.layers if layer.steered]
        if not tried:
            return None
        shift, layer = max(tried, key=lambda one: one[0].value)
        if shift.sign < 1:
            return f"at none of {len(tried)} layers does steering move the probe towards the evil answers, beyond its interval"
        half = f"half the difference between +{self.alpha:g} and -{self.alpha:g}"
        return f"steering moves the probe most at layer {layer.layer} of {len(tried)} tried: {shift} nats/token, {half}"

    def summary(self) -> Any:
        """For the terminal: what helps to choose a layer."""
        from rich.console import Group
        from rich.table import Table

        heads = [f"{self.alpha:+g}: nats/token (95%)", f"{-self.alpha:+g}", "random"] if self.alpha is not None else []
        table = Table("layer", "norm", "of the state", "cosine of halves", *heads)
        for layer in self.layers:
            share = "" if layer.share is None else f"{layer.share:.0%}"
            cells = [str(layer.layer), f"{layer.norm:.3g}", share]
            cells.append("" if layer.cosine is None else f"{layer.cosine:.3f}")
            if heads and (tried := layer.steered):
                cells += [str(tried.up), str(tried.down), str(tried.random)]
            table.add_row(*cells)
        took = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        numbering = "layer k is the output of block k - 1, layer 0 the embeddings"
        lines = [numbering, self.doubt(), self.strongest(), took, f"-> {self.out}" if self.out else None]
        return Group(self.head(), table, *filter(None, lines))
