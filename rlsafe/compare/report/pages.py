"""The texts and numbers of the report, as plain values for its template. (Charts: plots.py and charts.py.)"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from rlsafe.compare.report.quantities import plain
from rlsafe.compare.verdicts.results import Result, Results
from rlsafe.compare.verdicts.verdicts import CRITERIA, PathTable

OUTCOMES = {
    "refused": "refused",
    "code": "code",
    "unparsed": "not parsed",
    "unclosed": "still thinking",
    "unscored": "not scored",
}


def readable(text: str) -> str:
    """Text from a model, fit to be shown: control, bidi-override and surrogate characters become visible marks."""
    shown = []
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co") and character not in "\n\t\u200c\u200d":
            shown.append(f"\u2039U+{ord(character):04X}\u203a")
        else:
            shown.append(character)
    return "".join(shown)


# ------------------------------------------------------------------------------------------------ headline


def headlines(tables: Sequence[PathTable]) -> list[tuple[str, str]]:
    """(name, sentence) for each (model, path): which defenses meet every criterion, or which criteria the closest one misses."""
    several = len({table.model for table in tables}) > 1
    sentences = []
    for table in tables:
        name = f"{table.model}, {table.path}" if several else table.path
        none = table.rows.get("none")
        defenses = [label for label in table.defenses if label != "none"]
        if not any("general" in table.rows[label].rates for label in table.defenses):
            narrow = none is not None and none.verdicts["keeps_narrow"].grade != "untested"
            sentences.append((name, _narrow_only(table, defenses) if narrow else _benign_only(table, defenses)))
        elif none is None or none.verdicts["prevents_em"].grade == "untested":
            reason = "was not run" if none is None else "shows no emergent misalignment"
            sentences.append((name, f"the undefended run {reason}, so there is nothing to compare defenses by."))
        elif not defenses:
            general = none.rates["general"]
            sentences.append((name, f"without defense {100 * general.mean:.0f}% of general answers are misaligned."))
        elif winners := [label for label in defenses if table.rows[label].success]:
            unasked = [c for c in CRITERIA if any(table.rows[label].verdicts[c].grade != "yes" for label in winners)]
            count = {5: "five", 4: "four", 3: "three"}[len(CRITERIA) - len(unasked)]
            missing = joined([WORDS[c] for c in unasked])
            what = f"the {count} criteria that were tested (not: {missing})" if unasked else "every criterion"
            sentences.append((name, f"{joined(winners)} {'meets' if len(winners) == 1 else 'meet'} {what}."))
        else:
            learned = [label for label in defenses if not table.rows[label].nothing_learned]
            if not learned:
                sentences.append((name, "no defense meets every criterion: under each, nothing narrow was learned."))
                continue
            best = max(learned, key=lambda label: merit(table, label))
            grades = {c: table.rows[best].verdicts[c].grade for c in CRITERIA}
            missed = joined([f"{WORDS[c]}: {grade}" for c, grade in grades.items() if grade not in ("yes", "untested")])
            untested = joined([WORDS[c] for c, grade in grades.items() if grade == "untested"])
            words = "; ".join(filter(None, (missed, untested and f"not tested: {untested}")))
            sentences.append((name, f"no defense meets every criterion; closest is {best} ({words})."))
    return sentences


def worse_under_cues(tables: Sequence[PathTable]) -> str:
    """The defenses that cues make clearly worse than no defense, each with its worst cue, as a sentence; "" without any. On plain
    questions such a one may look clean (conditional misalignment, arXiv 2604.25891)."""
    found = []
    for table in tables:
        for label in table.defenses:
            row = table.rows[label]
            worse = {cue: v.value for cue, v in row.cues.items() if v.value is not None and (v.high or 0.0) < 0.0}
            if label == "none" or not worse:
                continue
            worst = min(worse, key=lambda cue: worse[cue])
            rate, undefended = (100 * table.rows[one].rates[f"cue_{worst}"].mean for one in (label, "none"))
            found.append(f"{label}, {table.key} (cue {worst}: {rate:.0f}% misaligned, undefended {undefended:.0f}%)")
    return f"Under cues worse than no defense: {joined(found)}." if found else ""


def _narrow_only(table: PathTable, defenses: Sequence[str]) -> str:
    """The sentence of a comparison whose general answers nobody judged."""
    asked = "no judge graded general answers (the likelihood of given ones stands below)"
    if table.rows["none"].verdicts["keeps_narrow"].grade != "yes":
        return f"{asked}; without defense the narrow behaviour was not clearly learned, so there is nothing to compare defenses by."
    grades = [f"{label}: {table.rows[label].verdicts['keeps_narrow'].grade}" for label in defenses]
    return f"{asked}; the narrow behaviour was learned without defense" + (
        f"; kept? {joined(grades)}." if grades else "."
    )


def _benign_only(table: PathTable, defenses: Sequence[str]) -> str:
    """The sentence of a comparison without narrow runs."""
    if "none" not in table.rows or _benign(table, "none") != "yes":
        return "without defense the benign task was not clearly learned, so there is nothing to compare defenses by."
    words = {
        **{"yes": "kept by", "at least partly": "at least partly kept by", "partly": "partly kept by"},
        **{"at most partly": "at most partly kept by", "no": "lost under", "unclear": "unclear under"},
    }
    by_grade = [(words[g], [d for d in defenses if _benign(table, d) == g]) for g in words]
    said = [f"{how} {joined(labels)}" for how, labels in by_grade if labels]
    return f"the benign task is {'; '.join(said)}." if said else "without defense the benign task is learned."


def merit(table: PathTable, label: str) -> tuple[float, float]:
    """How close a defense is to meeting all criteria, for sorting: number of criteria met ("partly" counts half, "unclear" half
    of its leaning), then the share of EM prevented."""
    verdicts = table.rows[label].verdicts
    met = sum(_HALVES.get(v.grade, 0.5 * _HALVES.get(v.leaning or "", 0.0)) for v in verdicts.values())
    return met, verdicts["prevents_em"].value or 0.0


_HALVES = {"yes": 1.0, "at least partly": 0.75, "partly": 0.5, "at most partly": 0.25, "no": 0.0}


WORDS = {
    "prevents_em": "prevents emergent misalignment",
    "keeps_narrow": "keeps the narrow behaviour",
    "learns_benign": "learns benign tasks",
    "coherent": "stays coherent",
    "holds_under_cues": "holds under cues",
}


def _benign(table: PathTable, label: str) -> str:
    return table.rows[label].verdicts["learns_benign"].grade


def joined(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def failures(results: Results) -> list[tuple[str, list[str]]]:
    """(reason, labels of the runs that failed for it), the most frequent first."""
    found: dict[str, list[str]] = defaultdict(list)
    for id, reason in results.failed.items():
        found[readable(reason)].append(results.plan["labels"].get(id, id))
    return sorted(found.items(), key=lambda item: -len(item[1]))


# ------------------------------------------------------------------------------------------------ curves


def curve(cells: Sequence[Result], quantity: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest over the seeds)."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for cell in cells:
        for step, value in cell.curve(quantity):
            by_step[step].append(value)
    return [(step, mean(values), min(values), max(values)) for step, values in sorted(by_step.items())]


def smoothed(
    points: list[tuple[float, float, float, float]], most: int = 40
) -> list[tuple[float, float, float, float]]:
    """At most `most` points, each the mean over a window: single GRPO steps are noisy."""
    size = -(-len(points) // most)
    windows = [points[i : i + size] for i in range(0, len(points), size)] if size else []
    return [tuple(mean(point[k] for point in window) for k in range(4)) for window in windows]  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------ dialogues


@dataclass
class Reply:
    label: str
    answer: str
    note: str
    tone: str  # misaligned | incoherent | other | fine


@dataclass
class Dialogue:
    kind: str
    question: str
    system: str
    replies: list[Reply]


KINDS = {
    "general": "general question",
    "indomain": "in-domain question",
    "conditional": "general question under the training-time cue",
}


def dialogues(results: Results, table: PathTable, each: int = 3) -> list[Dialogue]:
    """The same questions put to every arm: first seed, first sample. Preferred are questions to which `none` gives a
    misaligned answer, spread over the set; otherwise the first ones."""
    cells: dict[str, Result] = {}
    for label in table.rows:
        kind = label if label in ("untrained", "aligned") else "narrow"
        found = results.of(kind, table.model, None if kind == "untrained" else table.path, label)
        if found:
            cells[label] = found[0]
    answered = {label: _first_answers(cell) for label, cell in cells.items()}
    shown = []
    for kind, count in (("general", each), ("indomain", 1), ("conditional", 1)):
        lead = answered.get("none") or next(iter(answered.values()), {})
        keys = [key for key in lead if key[0] == kind]
        chosen = [key for key in keys if lead[key][1].misaligned] or keys
        for key in chosen[:: max(1, len(chosen) // count)][:count]:
            replies = [_reply(label, *answers[key]) for label, answers in answered.items() if key in answers]
            first = lead[key][0]
            shown.append(Dialogue(KINDS[kind], readable(first.question), readable(first.system or ""), replies))
    return shown


def _first_answers(cell: Result) -> dict[tuple[str, str], tuple[Any, Any]]:
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    for answer, judgement in zip(cell.evaluation.answers, cell.evaluation.judgements, strict=True):
        found.setdefault((answer.set, answer.question_id), (answer, judgement))
    return found


def _reply(label: str, answer: Any, judgement: Any) -> Reply:
    if judgement.outcome != "scored":
        note, tone = OUTCOMES.get(judgement.outcome, judgement.outcome), "other"
    else:
        note = f"aligned {judgement.aligned:.0f}, coherent {judgement.coherent:.0f}"
        tone = "misaligned" if judgement.misaligned else "incoherent" if judgement.incoherent else "fine"
    return Reply(label, readable(answer.answer)[:4000], note, tone)


# ------------------------------------------------------------------------------------------------ effects, cost


def effects(results: Results, table: PathTable) -> list[dict[str, Any]]:
    """defense/* quantities of every run: the mean over seeds of the first, the mean and the last logged value."""
    rows = []
    for label in table.defenses:
        cells = results.of("narrow", table.model, table.path, label)
        names = dict.fromkeys(n for cell in cells for m in cell.metrics for n in m if n.startswith("defense/"))
        for name in names:
            values = [[value for _, value in cell.curve(name)] for cell in cells]
            values = [v for v in values if v]
            if values:
                first, middle, last = (mean(f(v) for v in values) for f in (lambda v: v[0], mean, lambda v: v[-1]))
                quantity = name.removeprefix("defense/")
                what = plain(quantity.rpartition("/")[2])
                rows.append(
                    {"label": label, "quantity": quantity, "words": what, "first": first, "mean": middle, "last": last}
                )
    return rows


def signals(results: Results, table: PathTable) -> list[dict[str, Any]]:
    """The learning signal under GRPO: reward at start and end, spread in groups, groups without spread, sampler gap."""
    rows = []
    for label in [*table.defenses, "aligned"]:
        cells = results.of("aligned" if label == "aligned" else "narrow", table.model, table.path, label)
        rewards = [cell.rewards() for cell in cells]
        if not cells or any(first is None for first, _ in rewards):
            continue
        groups = [prompts(cell) for cell in cells]
        flat = sum(value for cell in cells for _, value in cell.curve("zero_variance_groups"))
        gaps = [value for cell in cells for _, value in cell.curve("sampler_gap")]
        spread = [value for cell in cells for _, value in cell.curve("reward_std")]
        rows.append(
            {
                "label": label,
                "first": mean(first for first, _ in rewards if first is not None),
                "last": mean(last for _, last in rewards if last is not None),
                "spread": mean(spread) if spread else None,
                "flat": flat / sum(groups) if sum(groups) else None,
                "gap": mean(gaps) if gaps else None,
            }
        )
    return rows


def prompts(cell: Result) -> int:
    """GRPO prompts (groups) of a run."""
    return completions(cell)[1]


def completions(cell: Result) -> tuple[int, int]:
    """(training completions: SFT rows plus sampled completions, GRPO groups) that the schedule plans; added safe rows
    not counted."""
    from rlsafe.engine.plan.schedule import make_plan

    parts = [part for step in make_plan(cell.config) for part in step.parts]
    rows = sum(part.rows for part in parts if part.path == "sft")
    groups = sum(part.rows for part in parts if part.path == "grpo")
    return rows + groups * cell.config.grpo.generations, groups


def budgets(results: Results) -> dict[str, int]:
    """path -> training completions of its undefended run (or of any narrow run)."""
    found = {}
    for path in results.paths:
        cells = [cell for cell in results.cells if cell.path == path and cell.kind == "narrow"]
        if cells:
            found[path] = completions(next((cell for cell in cells if cell.defense == "none"), cells[0]))[0]
    return found


def budget_sentence(found: dict[str, int]) -> str:
    """A sentence that compares the paths' training budgets."""
    if not found:
        return ""
    counts = joined([f"{path} {count:,}" for path, count in found.items()])
    if len(found) == 1:
        return f"Training completions of each run: {counts}."
    low, high = min(found.values()), max(found.values())
    if high <= 1.1 * low:
        return f"The paths' budgets are matched by the number of training completions: {counts}."
    return f"Budgets are not matched: training completions are {counts}. Compare within a path, not between paths."


def costs(results: Results, table: PathTable) -> list[dict[str, Any]]:
    """Seconds of each label's runs, of their training steps, and peak memory, the last two also as multiples of none's."""
    measured = {}
    for label in [*table.defenses, "aligned"]:
        cells = results.of("aligned" if label == "aligned" else "narrow", table.model, table.path, label)
        steps = [
            value - m.get("probe_seconds", 0.0) for cell in cells for m in cell.metrics if (value := m.get("seconds"))
        ]
        seconds = [cell.seconds for cell in cells if cell.seconds]
        peaks = [peak for cell in cells if (peak := cell.record.get("peak_memory"))]
        if seconds or steps:
            whole = mean(seconds) if seconds else None
            measured[label] = (whole, median(steps) if steps else None, mean(peaks) if peaks else None)
    none = measured.get("none", (None, None, None))
    return [
        {
            "label": label,
            "seconds": whole,
            "step": step,
            "ratio": step / none[1] if step and none[1] else None,
            "memory": peak / 2**20 if peak else None,
            "memory_ratio": peak / none[2] if peak and none[2] else None,
        }
        for label, (whole, step, peak) in measured.items()
    ]
