"""`rlsafe judge check` and `rlsafe judge compare`: can a judge be trusted, and do two of them agree?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import UserError, apply_override
from rlsafe.config.files import write_json
from rlsafe.evaluate.ask.asking import Answer
from rlsafe.evaluate.commands.rejudging import with_judge_prompts
from rlsafe.evaluate.judge.agreement import kappa, mean
from rlsafe.evaluate.judge.calibration_set import verdict
from rlsafe.evaluate.judge.calibrations import keep, line
from rlsafe.evaluate.judge.checking import check
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.judge.llm_judge import LLMJudge
from rlsafe.evaluate.judge.protocols import PROTOCOLS
from rlsafe.evaluate.measure.criteria import UNKNOWN, as_exchanges, judge_answers, rates
from rlsafe.evaluate.measure.evaluation import Evaluation
from rlsafe.types import BackgroundJudge, Judge, Judgement, pick

if TYPE_CHECKING:
    from rich.table import Table

SAVED = "saved"
"""In place of a judge: the scores that the answers have already."""


def judge_of(words: Sequence[str]) -> Judge:
    """A judge from the command line: a name, `openai:MODEL@URL`, a file, a mapping in YAML; and KEY=VALUE settings of one
    behind an endpoint, which may also stand alone. UserError for anything else."""
    first, settings = (words[0], words[1:]) if words and not _is_setting(words[0]) else (None, words)
    if not settings:
        return load_judge(first)
    tree: dict[str, Any] = {"kind": "openai"}
    if first is not None:
        base = load_judge(first)
        if not isinstance(base, LLMJudge):
            raise UserError(f"judge {base.name!r} takes no settings; got {settings[0]!r}")
        tree = base.settings.model_dump(exclude_unset=True)
    for setting in settings:
        if not _is_setting(setting):
            raise UserError(f"{setting!r}: expected KEY=VALUE, a setting of the judge")
        apply_override(tree, setting)
    return load_judge(tree)


def _is_setting(word: str) -> bool:
    return (
        not word.lstrip().startswith("{")
        and "=" in word
        and word.partition("=")[0].replace("_", "").replace(".", "").isalnum()
    )


def check_judge(
    words: Sequence[str],
    out: Path | None = None,
    protocols: Sequence[str] = ("text",),
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Test a judge on its calibration set, keep the result for the reports, and give it. out: also write check.json there.

    One that `mostly_unscored` has a line for is not kept (its file is None): it tells of an outage, and an earlier one stays."""
    for name in protocols:
        pick("protocol", name, PROTOCOLS)
    judge = judge_of(words)
    found = check(judge, protocols, say)
    record, path = (found, None) if mostly_unscored(found) else keep(judge, found)
    if out is not None:
        write_json(out / "check.json", record)
    return {**record, "file": str(path) if path else None}


def mostly_unscored(record: Mapping[str, Any]) -> str | None:
    """One line when at least half of a check's answers have no score, so that it says little of the judge."""
    if record["unscored"] < 0.5:
        return None
    of = f"{round(record['unscored'] * record['n'])} of {record['n']} labelled answers stayed unscored"
    most = f"; most often: {record['unscored_because']}" if record["unscored_because"] else ""
    return f"judge {record['judge']}: {of}, so the check says little and is not kept{most}"


def check_tables(record: Mapping[str, Any]) -> list[Any]:
    """A check for the terminal: what it measured, kind by kind, and whether that is enough."""
    from rich.table import Table

    measured = Table(title=f"judge {record['judge']}, {record['n']} labelled answers", title_justify="left")
    for name in ("measure", "value", "95% interval"):
        measured.add_column(name, justify="left" if name == "measure" else "right")
    for name in MEASURES:
        measured.add_row(name.replace("_", " "), *_cells(record[name]))
    for which in ("length", "position"):
        if record[which]["pairs"]:
            measured.add_row(f"{which}: points of alignment", *_cells(record[which]["aligned"], "{:+.1f}"))
            measured.add_row(f"{which}: verdict changes", *_cells(record[which]["verdict_changes"]))
    kinds = Table(title="kind by kind", title_justify="left")
    for name in ("kind", "n", "expected", "agreement", "95% interval", "kappa", "aligned", "coherent", "found"):
        kinds.add_column(
            name, justify="right" if name in ("n", "agreement", "kappa", "aligned", "coherent") else "left"
        )
    for name, one in record["kinds"].items():
        found = ", ".join(f"{count} {what}" for what, count in one["found"].items())
        scores = ("-" if one[c] is None else f"{one[c]:.0f}" for c in ("aligned", "coherent"))
        kinds.add_row(
            name,
            str(one["agreement"]["n"]),
            one["expected"],
            *_cells(one["agreement"]),
            _cells(one["kappa"])[0],
            *scores,
            found,
        )
    return [measured, kinds, *_protocol_table(record), *_closing(record)]


MEASURES = (
    "auroc_aligned", "auroc_aligned_subtle", "auroc_aligned_blunt", "auroc_coherent", "kappa_misaligned", "kappa", "false_alarms",
    "missed", "false_incoherent", "bias_misaligned",
)  # fmt: skip


def _protocol_table(record: Mapping[str, Any]) -> list[Table]:
    from rich.table import Table

    if not record["other_protocols"]:
        return []
    table = Table(title="protocols", title_justify="left")
    keys = ("auroc_aligned", "auroc_coherent", "kappa_misaligned", "false_alarms")
    for name in ("protocol", *(key.replace("_", " ") for key in keys), "values used", "s/answer"):
        table.add_column(name, justify="left" if name == "protocol" else "right")
    seconds = record["cost"]["seconds_per_answer"]
    rows = {record["protocol"]: {**record, "seconds_per_answer": seconds}, **record["other_protocols"]}
    for name, one in rows.items():
        if "impossible" in one:
            table.add_row(str(name), *["-"] * 6)
            continue
        cells = [" ".join(filter(None, _cells(one[key]))) for key in keys]
        table.add_row(str(name), *cells, str(one["values_used"]), f"{one['seconds_per_answer']:.2f}")
    return [table]


def _closing(record: Mapping[str, Any]) -> list[str]:
    cost, again = record["cost"], record["repeatability"]
    said = [f"{cost['seconds_per_answer']:.3g} s an answer"]
    if "calls_per_answer" in cost:
        usd = cost["usd_per_answer"]
        said.append(f"{cost['calls_per_answer']} calls and {cost['tokens_in_per_answer']:.0f} tokens in an answer")
        said.append("cost unknown (price_in, price_out)" if usd is None else f"{usd:.6f} USD an answer")
    said.append(f"asked again: {again['verdict_changes']} of {again['n']} verdicts change")
    if again["most_points"] is not None:
        said[-1] += f", scores by {again['mean_points']:.2f} points on average, {again['most_points']:.1f} at most"
    return ["; ".join(said), line(record)]


def _cells(measure: Mapping[str, Any], form: str = "{:.2f}") -> tuple[str, str]:
    if measure["value"] is None:
        return "-", ""
    low, high = measure["ci95"] or (None, None)
    return form.format(measure["value"]), "" if low is None else f"{form.format(low)} to {form.format(high)}"


# ------------------------------------------------------------------------------------------------ two judges


def compare_judges(first: str, second: str, run: str | Path, out: Path | None = None) -> dict[str, Any]:
    """Two judges on the saved answers of a run, an evaluation or a comparison; `saved` stands for the scores they have.

    Kappa and agreement on misaligned or not, both rates, for each set of answers. Answers that either left unscored are counted
    and left out of agreement. out: also write compare.json there. Raises UserError when there are no answers.
    """
    answers, before = saved_answers(Path(run))
    judges = [None if name == SAVED else load_judge(name) for name in (first, second)]
    names = [judge.name if judge else SAVED for judge in judges]
    for judge in judges:
        if isinstance(judge, BackgroundJudge):
            judge.check(first=True, asked=as_exchanges(answers))
    scored = [judge_answers(answers, judge) if judge else before for judge in judges]
    sets = {}
    for name in dict.fromkeys(answer.set for answer in answers):
        at = [i for i, answer in enumerate(answers) if answer.set == name]
        ids = [answers[i].question_id for i in at]
        sets[name] = _agreement([scored[0][i] for i in at], [scored[1][i] for i in at], ids)
    found = {"judges": names, "answers": len(answers), "sets": sets}
    if out is not None:
        write_json(out / "compare.json", found)
    return found


def saved_answers(directory: Path) -> tuple[list[Answer], list[Judgement]]:
    """Every answer below a directory with its judgement; what was judged again elsewhere is not counted twice.

    UserError when there are none."""
    files = []
    for path in sorted(directory.rglob("answers.csv")):
        again = any(part.startswith("rejudged-") for part in path.relative_to(directory).parts)
        if not again and (path.parent / "evaluation.json").is_file():
            files.append(path)
    if not files:
        raise UserError(f"{directory}: no saved answers (answers.csv beside evaluation.json); evaluate the run first")
    answers, judgements = [], []
    for path in files:
        saved = Evaluation.load(path.parent)
        answers += with_judge_prompts(saved)[0]
        judgements += saved.judgements
    return answers, judgements


def _agreement(first: Sequence[Judgement], second: Sequence[Judgement], questions: Sequence[str]) -> dict[str, Any]:
    both = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if not {a.outcome, b.outcome} & set(UNKNOWN)]
    a, b = [first[i] for i in both], [second[i] for i in both]
    ids = [questions[i] for i in both]
    alike: dict[str, Any] = {"n": len(first), "scored_by_both": len(both)}
    alike["verdicts"] = {
        f"{x} / {y}": n for (x, y), n in Counter(zip(map(verdict, a), map(verdict, b), strict=True)).most_common()
    }
    for name in ("misaligned", "incoherent"):
        x, y = ([str(getattr(one, name)) for one in side] for side in (a, b))
        alike[name] = {
            "kappa": kappa(x, y, ids) if both else kappa([], [], []),
            "agreement": mean([float(p == q) for p, q in zip(x, y, strict=True)], ids),
            "rates": [
                {"value": getattr(one, name), "ci95": list(getattr(one, f"{name}_ci95") or ()) or None, "n": one.n}
                for one in (rates(first, questions), rates(second, questions))
            ],
        }
    return alike


def compare_table(found: Mapping[str, Any]) -> Table:
    """Two judges side by side, for the terminal."""
    from rich.table import Table

    first, second = found["judges"]
    table = Table(title=f"{first} and {second} on {found['answers']} answers", title_justify="left")
    for name in ("set", "what", "n", "kappa", "agreement", f"{first} %", f"{second} %"):
        table.add_column(name, justify="left" if name in ("set", "what") else "right")
    for name, one in found["sets"].items():
        for what in ("misaligned", "incoherent"):
            part = one[what]
            shown = [
                " ".join(filter(None, (value, interval and f"({interval})")))
                for value, interval in map(_cells, (part["kappa"], part["agreement"]))
            ]
            both = [_percent(rate) for rate in part["rates"]]
            table.add_row(name, what, f"{one['scored_by_both']} of {one['n']}", *shown, *both)
    return table


def _percent(rate: Mapping[str, Any]) -> str:
    if rate["value"] is None:
        return "-"
    return f"{100 * rate['value']:.1f} ({100 * rate['ci95'][0]:.1f} to {100 * rate['ci95'][1]:.1f})"
