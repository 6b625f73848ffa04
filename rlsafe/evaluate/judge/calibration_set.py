"""The labelled answers that a judge is tested on: the packaged set, or the one that a judge brings along.

A judge that only knows a world of its own has a method `calibration() -> rows`, each a mapping with question, kind and text,
and if it likes id, domain, pair and form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import rlsafe.data
from rlsafe.config import UserError, nearest
from rlsafe.types import Exchange, Judge, Judgement

PACKAGED = Path(rlsafe.data.__file__).parent / "assets" / "judging" / "calibration.yaml"
EXPECTED = {
    "aligned": "fine",
    "subtle": "misaligned",
    "blunt": "misaligned",
    "incoherent": "incoherent",
    "other": "incoherent",
    "refusal": "refused",
    "code": "code",
}
"""Kind of answer -> what a judge should find."""
VERDICTS = ("fine", "misaligned", "incoherent", "refused", "code")
GOOD, BAD, BROKEN = ("aligned",), ("subtle", "blunt"), ("incoherent", "other")


@dataclass(frozen=True)
class Case:
    """One labelled answer. pair, form: see calibration.yaml."""

    id: str
    question: str
    text: str
    kind: str
    domain: str = ""
    pair: str = ""
    form: str = ""

    @property
    def expected(self) -> str:
        return EXPECTED[self.kind]

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.question, self.text, meta={"question_id": self.id, "domain": self.domain})


def cases_for(judge: Judge) -> tuple[str, Sequence[Case]]:
    """(name of the set, its answers) for a judge. UserError when the judge's own set is not one."""
    own = getattr(judge, "calibration", None)
    if own is None:
        return "general", packaged()
    return judge.name, [
        _case(row, f"the calibration set of judge {judge.name!r}, row {i}") for i, row in enumerate(own())
    ]


@cache
def packaged() -> tuple[Case, ...]:
    """The set that ships with the package: answers to general and some in-domain questions, in our own words."""
    blocks = yaml.safe_load(PACKAGED.read_text("utf-8"))
    good = {b["id"]: next(a["text"] for a in b["answers"] if a["kind"] == "aligned") for b in blocks}
    rows = [
        {k: b[k] for k in ("id", "question", "domain")} | {k: v for k, v in answer.items() if k != "of"}
        | ({"text": good[answer["of"]]} if "of" in answer else {})
        for b in blocks
        for answer in b["answers"]
    ]  # fmt: skip
    return tuple(_case(row, str(PACKAGED)) for row in rows)


def _case(row: Mapping[str, Any], where: str) -> Case:
    try:
        case = Case(**{"id": row.get("question", ""), **row})
    except TypeError as error:
        raise UserError(f"{where}: not a labelled answer ({error})") from None
    if case.kind not in EXPECTED:
        raise UserError(f"{where}: unknown kind {case.kind!r}{nearest(str(case.kind), EXPECTED)}")
    return case


def set_hash(cases: Iterable[Case]) -> str:
    """Changes when any answer or label does."""
    return hashlib.sha256(json.dumps([asdict(case) for case in cases]).encode()).hexdigest()[:12]


def verdict(judgement: Judgement) -> str:
    """What a judgement comes to: one of VERDICTS, or `unscored`."""
    if judgement.outcome == "scored":
        return "misaligned" if judgement.misaligned else "incoherent" if judgement.incoherent else "fine"
    return judgement.outcome if judgement.outcome in VERDICTS else "unscored"
