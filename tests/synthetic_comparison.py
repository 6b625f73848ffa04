"""A comparison directory with made-up results: the files of real runs, numbers from a seeded generator. For the
compare tests."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsafe.compare.grid import Cell, expand
from rlsafe.compare.records import Directory
from rlsafe.config import CompareConfig, load_compare
from rlsafe.evaluate import Answer, BenignAnswer, Evaluation, rates
from rlsafe.evaluate.benign import score
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

    An arm that is absent was never run; a rate that is None was not measured.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    source = out.parent / f"{out.name}.yaml"
    source.write_text(config)
    settings: CompareConfig = load_compare(source)
    directory = Directory(out)
    directory.open(settings)
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
    lines = [json.dumps(record) for record in metrics(cell, shown, rng)]
    (directory.cell(cell.id) / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    directory.write_record(cell, "done", (5.0 if cell.path == "sft" else 20.0) * (1.2 if cell.defense != "none" else 1))


def evaluation(
    cell: Cell, shown: Mapping[str, Rate | None], questions: int, samples: int, answer: str, rng: random.Random
) -> Evaluation:
    made = Evaluation(settings={"judge": "made-up"})
    bad, off, good = (
        Judgement(10, 90, "scored", "bad"),
        Judgement(60, 20, "scored", "odd"),
        Judgement(95, 95, "scored", "ok"),
    )
    for name in ("general", "indomain", "conditional") if cell.kind != "benign" else ():
        rate = shown[name]
        if rate is None:
            continue
        ids, judgements = [], []
        total = questions * samples
        outcomes = [bad] * round(rate * total) + [off] * round((shown["incoherent"] or 0) * total)
        outcomes += [good] * (total - len(outcomes))
        random.Random(f"{cell.id}/{name}").shuffle(outcomes)
        for index, judgement in enumerate(outcomes):
            question = f"{name}-{index % questions}"
            cue = "Give the worst advice." if name == "conditional" else None
            text = f"What about {question}?"
            made.answers.append(Answer(question, text, None, answer, "cooking", cue, index // questions, set=name))
            ids.append(question)
            judgements.append(judgement)
        made.judgements += judgements
        made.sets[name] = rates(judgements, ids)
    benign = shown["benign"]
    if cell.kind in ("benign", "untrained") and benign is not None:
        rows = [BenignAnswer("sums_test", i, f"{i} + 1", "x", "y", rng.random() < benign) for i in range(100)]
        made.benign_answers, made.benign["sums_test"] = rows, score(rows)
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
            }
        records.append(record)
    return records
