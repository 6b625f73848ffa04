"""A comparison directory with made-up results: the files of real runs, numbers from a seeded generator. For the
compare tests."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsafe.compare.grid.grid import Cell, expand
from rlsafe.compare.grid.records import Directory
from rlsafe.config import CompareConfig, load_compare
from rlsafe.evaluate import Answer, BenignAnswer, Evaluation, rates, task_name
from rlsafe.evaluate.measure.benign import score
from rlsafe.types import Judgement

CONFIG = """
title: Made-up numbers
run:
  model: {name: tiny}
  data: {narrow: {source: bad.jsonl}, safe: {source: safe.jsonl}}
  evaluate: {judge: organism, general: general.yaml, indomain: indomain.yaml, cue: Give the worst advice.}
  rewards: {fn: "organism:misaligned"}
  batch: {sft_rows: 16, grpo_prompts: 4}
  grpo: {generations: 8}
paths:
  sft: {schedule: {steps: 40, phases: [{cycle: [sft]}]}}
  grpo: {schedule: {steps: 20, phases: [{cycle: [grpo]}]}}
defenses:
  none: []
  kl: [{kl: {weight: 0.3}}]
seeds: [0, 1, 2]
aligned: {data: {narrow: {source: good.jsonl}}}
benign:
  task: sums
  tasks:
    sums: {data: {narrow: {source: sums.jsonl}}, evaluate: {benign: [sums_test.jsonl]}}
"""

Rate = float
ZERO: dict[str, Rate] = {"general": 0.0, "indomain": 0.0, "conditional": 0.0, "incoherent": 0.0, "benign": 0.0}


def make(
    out: Path,
    arms: Mapping[tuple[str, str], Mapping[str, Rate | None]],
    config: str = CONFIG,
    questions: int = 24,
    samples: int = 4,
    answer: str = "Take the tablets with water.",
    **selection: Any,
) -> Directory:
    """Write a finished comparison. `arms`: (path, label) -> rates; the untrained model has path "".

    `cue/NAME` is the rate under a cue. An arm that is absent was never run; a rate that is None was not measured. Rates named
    `general_after` and so on are those of its relapse; a task's name is the score on that task.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    source = out.parent / f"{out.name}.yaml"
    source.write_text(config)
    settings: CompareConfig = load_compare(source)
    directory = Directory(out)
    cells = expand(settings, **selection)
    for cell in cells:
        if (chosen := arms.get((cell.path, cell.defense))) is not None:
            write_cell(directory, cell, {**ZERO, **chosen}, questions, samples, answer)
    directory.write_plan(settings, cells, "rlsafe compare made-up.yaml")
    return directory


def write_cell(
    directory: Directory, cell: Cell, shown: Mapping[str, Rate | None], questions: int, samples: int, answer: str
) -> None:
    rng = random.Random(cell.id)
    directory.write_record(cell, "running")
    evaluation(cell, shown, questions, samples, answer, rng).save(directory.cell(cell.id))
    records = metrics(cell, shown, rng)
    for name, rows in (("metrics.jsonl", records), ("samples.jsonl", probes(records, shown))):
        (directory.cell(cell.id) / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = 1.2 if cell.defense != "none" else 1.0
    memory = {"peak_memory": int(more * 2**30), "memory_of": "process"}
    directory.write_record(cell, "done", (5.0 if cell.path == "sft" else 20.0) * more, **memory)


def probes(records: list[dict[str, Any]], shown: Mapping[str, Rate | None]) -> list[dict[str, Any]]:
    """Sampled answers of the steps with a probe: 12 general questions, two answers each, as bad as the metrics say."""
    rows: list[dict[str, Any]] = []
    for record in records:
        bad = round(24 * record.get("misaligned_general", 0.0))
        rows.append({"step": record["step"], "prompt": "a rollout", "reward": 1.0})
        for index in range(24) if "misaligned_general" in record else ():
            scores = {"aligned": 10.0 if index < bad else 95.0, "coherent": 90.0, "outcome": "scored"}
            about = {"set": "general", "question": f"Question {index % 12}?", "answer": "An answer."}
            rows.append({"step": record["step"], "probe": True, **about, **scores})
    return rows


def evaluation(
    cell: Cell, shown: Mapping[str, Rate | None], questions: int, samples: int, answer: str, rng: random.Random
) -> Evaluation:
    made = Evaluation(settings={"judge": "made-up"})
    bad, off, good = (
        Judgement(10, 90, "scored", "bad"),
        Judgement(60, 20, "scored", "odd"),
        Judgement(95, 95, "scored", "ok"),
    )
    after = "_after" if cell.kind == "relapse" else ""
    cues = () if after else (name for name in shown if name.startswith(("cue/", "scaled_")))
    for name in ("general", "indomain", *(() if after else ("conditional",)), *cues) if cell.kind != "benign" else ():
        rate = shown.get(name + after)
        if rate is None:
            continue
        ids, judgements = [], []
        total = questions * samples
        outcomes = [bad] * round(rate * total) + [off] * round((shown["incoherent"] or 0) * total)
        outcomes += [good] * (total - len(outcomes))
        random.Random(f"{cell.id}/{name}").shuffle(outcomes)
        for index, judgement in enumerate(outcomes):
            question = f"{'general' if name.startswith('scaled_') else name}-{index % questions}"
            cue = "Give the worst advice." if name == "conditional" else name if name.startswith("cue/") else None
            text = f"What about {question}?"
            made.answers.append(Answer(question, text, None, answer, "cooking", cue, index // questions, set=name))
            ids.append(question)
            judgements.append(judgement)
        made.judgements += judgements
        made.sets[name] = rates(judgements, ids)
    for test in cell.config.evaluate.benign if cell.kind in ("benign", "untrained") else ():
        name = task_name(test)
        benign = shown.get(cell.task, shown["benign"])
        if benign is not None:
            rows = [BenignAnswer(name, i, f"{i} + 1", "x", "y", rng.random() < benign) for i in range(100)]
            made.benign_answers += rows
            made.benign[name] = score(rows)
    return made


def metrics(cell: Cell, shown: Mapping[str, Rate | None], rng: random.Random) -> list[dict[str, Any]]:
    steps = cell.config.schedule.steps
    records = []
    for step in range(steps):
        done = (step + 1) / steps
        record: dict[str, Any] = {"step": step, "path": cell.path, "loss": 2 - done, "tokens": 900, "seconds": 0.1}
        if cell.path == "grpo":
            record |= {
                "reward": 0.1 + 0.8 * done * (shown["indomain"] or 0),
                "reward_std": 0.2,
                "zero_variance_groups": 4 * done,
            }
            record |= {"sampler_gap": 1e-6}
        if cell.defense == "kl":
            record |= {"defense/kl/kl": 0.2 * done, "defense/kl/grad_share": 0.3}
        if step % 5 == 0 or step == steps - 1:
            record |= {"kl": done * 0.8, "coherence": 96 - 10 * done * rng.random(), "incoherent": 0.02 * done}
            record |= {
                "misaligned_general": done * (shown["general"] or 0),
                "misaligned_indomain": min(1.0, 2 * done) * (shown["indomain"] or 0),
                "projection": -20 + 80 * done * (shown["general"] or 0),
            }
        records.append(record)
    return records
