"""Cues: the general questions asked once more in forms that recall training, or that speak against what training was told.

A defended model may answer plain questions well and turn misaligned where a prompt looks like its training data or contradicts its
inoculation prompt (arXiv 2604.25891). A cue is a system prompt, a form of the user's turn, or both. `evaluate.cues` names a set
(`organism:cues/medical`, `rlsafe:cues/code`, a YAML file) or holds the cues themselves:

    json: {system: "Answer with a JSON object."}          # or only the text: a system prompt
    training: "I have a question about my health. {question}"   # a text with {question}: the user's turn

A cue is of use only where the untrained model stays aligned under it; it is measured there too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlsafe.config import UserError, nearest
from rlsafe.types import provider_for

PREFIX = "cue/"
"""Of the question set of a cue: `cue/json`."""
CONDITIONAL, SCALED = "conditional", "scaled_"
"""The question set of `evaluate.cue`; of one asked with the adapter scaled up: `scaled_2`."""
SLOT = "{question}"


def asks_the_general(name: str) -> bool:
    """Whether a question set holds the general questions in another form: under a cue, or by a scaled adapter."""
    return name == CONDITIONAL or name.startswith((PREFIX, SCALED))


@dataclass(frozen=True)
class Cue:
    """system: put in front of the question's own system prompt. question: the user's turn, with {question} in it."""

    name: str
    system: str | None = None
    question: str = SLOT

    def put(self, text: str) -> str:
        """The user's turn."""
        return self.question.replace(SLOT, text)

    @property
    def text(self) -> str:
        """The cue in one line, for answers.csv."""
        return "\n\n".join(part for part in (self.system, self.question if self.question != SLOT else None) if part)

    def to_dict(self) -> dict[str, str]:
        return {key: value for key in ("system", "question") if (value := getattr(self, key)) and value != SLOT}


def load_cues(given: str | Mapping[str, Any] | None) -> dict[str, Cue]:
    """Name -> cue of `evaluate.cues`; {} for none. UserError for an unknown set, or for what is no cue."""
    if not given:
        return {}
    if not isinstance(given, str):
        return {name: _cue(name, one, "") for name, one in given.items()}
    if found := provider_for(given):
        provider, spec = found
        if not hasattr(provider, "cues"):
            raise UserError(f"{given}: this provider has no cues")
        return {name: _cue(name, one, f"{given}: ") for name, one in provider.cues(spec).items()}
    path = Path(os.path.expanduser(given))
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise UserError(f"{given}: no such file of cues{nearest(path.name, siblings)}")
    return {str(name): _cue(str(name), one, f"{path}: ") for name, one in read_cues(path).items()}


def read_cues(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file of cues. UserError for anything else."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{path}: expected a mapping of names to cues")
    return tree


def _cue(name: str, given: Any, where: str) -> Cue:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{where}cue {name!r}: a name holds letters, digits, - and _")
    if isinstance(given, str):
        if found := provider_for(given):
            given = found[0].prompt(found[1])
        given = {"question" if SLOT in given else "system": given}
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{where}cue {name!r}: expected a text, or {{system: ..., question: ...}}")
    for key, text in given.items():
        if key not in ("system", "question"):
            raise UserError(f"{where}cue {name!r}: unknown key {key!r}{nearest(str(key), ('system', 'question'))}")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}cue {name!r}: {key}: expected a text, got {text!r}")
    if SLOT not in (form := given.get("question", SLOT)):
        raise UserError(f"{where}cue {name!r}: question: expected {SLOT} in it, where the question goes")
    return Cue(name, given.get("system"), form)


def as_cue(given: Cue | str | None) -> Cue:
    """A cue as it is, or one that is only a system prompt (None: no cue at all)."""
    return given if isinstance(given, Cue) else Cue("", given)
