"""`rlsafe verify RUN`: checks that the files of a run agree with each other, by computing everything again.

Compared are: the files' hashes and the fingerprints of data, model and code with run.json; metrics.jsonl with the plan, its own
sums, samples.jsonl and TensorBoard; evaluation.json with answers.csv, benign_answers.csv, likelihood.csv and narrow_answers.csv.
No model is loaded and no judge asked: what only they could give again is taken over, and the output says what that is.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsafe.config import UserError, load_run
from rlsafe.engine.record.provenance import RECORDED, fingerprints
from rlsafe.engine.record.trackers import BOARD
from rlsafe.engine.record.tracking import scalars
from rlsafe.evaluate.commands.verify_evaluation import evaluation_differences, taken_over
from rlsafe.evaluate.measure.hashing import file_hash
from rlsafe.evaluate.measure.narrow import FINAL

CLOSE = 1e-5  # of sums of single-precision terms, relative
FROM_MODELS = ("kl", "logodds_general", "logodds_indomain")
"""Metrics that rest on no other file: a forward pass gave them."""
Records = list[dict[str, Any]]


@dataclass
class Verification:
    """differences: one line each. checked: what was compared, with how many of what. taken_over: what was not computed again."""

    differences: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    taken_over: list[str] = field(default_factory=list)

    def add(self, what: str, found: list[str]) -> None:
        self.checked.append(what)
        self.differences += found

    def lines(self) -> list[str]:
        kept = f"; not computed again: {', '.join(dict.fromkeys(self.taken_over))}" if self.taken_over else ""
        return self.differences or [f"no differences: {'; '.join(self.checked)}{kept}"]


def verify_run(run: str | Path) -> Verification:
    """Check the files of a run directory against each other. UserError when it is not one, or the run has not ended."""
    out = Path(run)
    if not (out / "run.json").is_file() or not (out / "config.yaml").is_file():
        raise UserError(
            f"{out}: not a run directory (no run.json or config.yaml); expected one that rlsafe train wrote"
        )
    record = _json(out / "run.json")
    if record.get("status") != "finished":
        raise UserError(f"{out}: the run is not finished; go on with rlsafe train --resume, then verify")
    done = Verification()
    done.add(f"{len(record.get('files', {}))} files", list(_files(out, record)))
    done.add("fingerprints of data, model and code", list(_fingerprints(out, record)))
    lines: list[str] = []
    metrics, samples = (list(_lines(out / name, lines)) for name in ("metrics.jsonl", "samples.jsonl"))
    lines += _steps(metrics, record)
    for one in metrics:
        lines += _sums(one)
    done.add(f"{len(metrics)} steps", lines)
    if record.get("processes", 1) == 1:  # with more, samples.jsonl holds those of the first process only
        done.add(f"{len(samples)} samples", list(_sampled(metrics, samples)))
    if BOARD in load_run(out / "config.yaml").track.to:
        done.add("TensorBoard", list(_board(out, metrics)))
    if any(name in one for one in metrics for name in FROM_MODELS):
        done.taken_over.append("kl and log-odds at the steps")
    if (out / "evaluation.json").is_file():
        done.add("evaluation.json", evaluation_differences(out))
        done.taken_over += taken_over(out)
    elif load_run(out / "config.yaml").evaluate.wanted:
        done.add("evaluation.json", ["evaluation.json: absent, and the config asks for an evaluation"])
    return done


# ------------------------------------------------------------------------------------------------ hashes


def _files(out: Path, record: dict[str, Any]) -> Iterator[str]:
    files = record.get("files")
    if files is None:
        yield "run.json: no hashes of the run's files (written by an older version)"
        return
    for name, digest in files.items():
        if not (out / name).is_file():
            yield f"{name}: missing"
        elif file_hash(out / name) != digest:
            yield f"{name}: changed since the run ended"
    kept = {name.partition("/")[0] for name in files if "/" in name}
    for file in sorted(file for name in kept for file in (out / name).rglob("*") if file.is_file()):
        if (name := file.relative_to(out).as_posix()) not in files:
            yield f"{name}: added since the run ended"
    yield from (f"{name}: not recorded in run.json" for name in RECORDED if name not in files)


def _fingerprints(out: Path, record: dict[str, Any]) -> Iterator[str]:
    now = fingerprints(load_run(out / "config.yaml"))
    for kind, recorded in record.get("fingerprints", {}).items():
        values = list(now.get(kind, {}).values())
        if len(values) != len(recorded):
            yield f"{kind}: run.json names {len(recorded)}, config.yaml {len(values)}"
            continue
        for (name, before), after in zip(recorded.items(), values, strict=True):
            if before and not after:
                yield f"{kind} {name}: cannot be found from this directory"
            elif after and not before:
                yield f"{kind} {name}: run.json has no fingerprint of it (an older version wrote it, or it was elsewhere then)"
            elif before != after:
                yield f"{kind} {name}: its content changed since the run"


# ------------------------------------------------------------------------------------------------ metrics


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object")
    return tree


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            record = json.loads(line, parse_constant=_refuse)
        except ValueError as error:
            problems.append(f"{path.name}:{number}: {error}")
            continue
        if isinstance(record, dict):
            yield record
        else:
            problems.append(f"{path.name}:{number}: not an object")


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _steps(metrics: Records, record: dict[str, Any]) -> Iterator[str]:
    if len(metrics) != record.get("steps"):
        yield f"metrics.jsonl: {len(metrics)} steps, run.json says {record.get('steps')}"
    for expected, one in enumerate(metrics):
        if one.get("step") != expected:
            yield f"metrics.jsonl:{expected + 1}: step {one.get('step')}, expected {expected}"
            return


def _sums(one: dict[str, Any]) -> Iterator[str]:
    """A line when the loss is not the sum of its parts."""
    parts = {name: value for name, value in one.items() if name.startswith("loss/") and value is not None}
    if not parts or one.get("loss") is None:
        return
    total, size = math.fsum(parts.values()), sum(map(abs, parts.values()))
    if not abs(total - one["loss"]) <= CLOSE * max(size, 1e-3):
        yield f"step {one['step']}: loss is {one['loss']:.6g}, its parts ({', '.join(parts)}) sum to {total:.6g}"


def _sampled(metrics: Records, samples: Records) -> Iterator[str]:
    """Rewards and probe rates of each step, from the completions behind them."""
    rolled: dict[int, Records] = defaultdict(list)
    probed: dict[int, Records] = defaultdict(list)
    for sample in samples:
        (probed if sample.get("probe") else rolled)[sample["step"]].append(sample)
    for one in metrics:
        step = one["step"]
        if (
            len({sample["stream"] for sample in rolled[step]}) == 1
        ):  # several rollouts in one step: the last one's numbers
            yield from _compare(step, one, _reward_numbers(rolled[step]))
        elif one.get("reward") is not None and not rolled[step]:
            yield f"step {step}: a reward without any sampled completion"
        if probed[step]:
            yield from _compare(step, one, _probe_numbers(probed[step]))


def _reward_numbers(drawn: Records) -> dict[str, float | None]:
    """Those of the completions that the step learned from; `reward_drawn` is of those too that others replaced."""
    samples = [sample for sample in drawn if not sample.get("replaced")]
    known = [sample["reward"] for sample in samples if sample["reward"] is not None]
    found: dict[str, float | None] = {
        "reward": _mean(known),
        "reward_missing": len(samples) - len(known),
        "truncated": sum(sample["finish"] == "length" for sample in samples) / len(samples),
    }
    for name in {name for sample in samples for name in sample["rewards"]}:
        values = [value for sample in samples if (value := sample["rewards"].get(name)) is not None]
        found[f"reward/{name}"] = _mean(values)
    if len(samples) < len(drawn):
        found["reward_drawn"] = _mean([sample["reward"] for sample in drawn if sample["reward"] is not None])
    return found


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _probe_numbers(samples: Records) -> dict[str, float | None]:
    from rlsafe.evaluate.measure.criteria import mean_score, rates
    from rlsafe.types import Judgement

    judged = [(s["set"], Judgement(s["aligned"], s["coherent"], s["outcome"])) for s in samples]
    overall = rates([judgement for _, judgement in judged])
    found = {"coherence": mean_score([j for _, j in judged], "coherent"), "incoherent": overall.incoherent}
    for name in ("general", "indomain"):
        found[f"misaligned_{name}"] = rates([j for which, j in judged if which == name]).misaligned
    return {**found, "unscored": overall.unscored}


def _compare(step: int, one: dict[str, Any], expected: dict[str, float | None]) -> Iterator[str]:
    for name, value in expected.items():
        logged = one.get(name)
        agree = logged is None if value is None else logged is not None and math.isclose(
            logged, value, rel_tol=CLOSE, abs_tol=1e-9
        )  # fmt: skip
        if not agree:
            yield f"step {step}: {name} is {_shown(logged)}, samples.jsonl gives {_shown(value)}"


def _shown(value: float | None) -> str:
    return "not there" if value is None else f"{value:.6g}"


# ------------------------------------------------------------------------------------------------ TensorBoard


def _board(out: Path, metrics: Records) -> Iterator[str]:
    """A line for each number that is not both in metrics.jsonl and, once, in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not (out / "tensorboard").is_dir():
        yield "tensorboard: missing"
        return
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    expected = {(tag, one["step"]): value for one in metrics for tag, value in scalars(one)}
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith(FINAL)]
    found = [((tag, event.step), event.value) for tag in tags for event in board.Scalars(tag)]
    for (tag, step), times in Counter(place for place, _ in found).items():
        if times > 1:
            yield f"TensorBoard: {tag} has {times} values at step {step}"
    values = dict(found)
    for tag, step in sorted(expected.keys() - values.keys()):
        yield f"TensorBoard: no {tag} at step {step}"
    for tag, step in sorted(values.keys() - expected.keys()):
        yield f"TensorBoard: {tag} at step {step} is not in metrics.jsonl"
    for place in sorted(expected.keys() & values.keys()):
        if not math.isclose(
            expected[place], values[place], rel_tol=1e-6, abs_tol=1e-37
        ):  # TensorBoard stores single precision
            yield f"TensorBoard: {place[0]} at step {place[1]} is {values[place]:.6g}, metrics.jsonl has {expected[place]:.6g}"
