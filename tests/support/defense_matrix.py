"""Every defense as a row of one table, and a laboratory that runs it: test_defense_matrix.py asks each row the same things.

A row says how the defense looks in a config at strength zero, weak and strong, and what its effect is: a number that the
undefended run does not have.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import letter_judge
import pytest
import torch
from tiny import conversation, save_tiny_model, write_jsonl
from tiny_architectures import random_batch
from tiny_runs import adapter, tree_with

from rlsafe.config import run_from_tree
from rlsafe.data import read_rows, sft_batches
from rlsafe.data.selection_scores import Score, row_key
from rlsafe.defenses.ldifs import feature_distance
from rlsafe.defenses.persona import save_vectors
from rlsafe.engine.run.life import run
from rlsafe.policy import ForwardPlan, Policy
from rlsafe.policy.scoring import nll
from rlsafe.types import Interrupted, Where

BOTH = [{"path": "grpo"}, {"path": "sft", "rows": 3, "weight": 0.5}]
PATHS: dict[str, dict[str, Any]] = {
    "sft": {"schedule": {"steps": 5, "phases": [{"cycle": ["sft"]}]}},
    "grpo": {"schedule": {"steps": 5, "phases": [{"cycle": ["grpo"]}]}},
    "mixed": {
        "schedule": {
            "steps": 6,
            "phases": [{"steps": 2, "cycle": ["sft"]}, {"cycle": ["grpo", "both"]}],
            "kinds": {"both": BOTH},
        }
    },
}
SHORT: dict[str, dict[str, Any]] = {
    "sft": {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}},
    "grpo": {"schedule": {"steps": 2, "phases": [{"cycle": ["grpo"]}]}},
    "mixed": {"schedule": {"steps": 2, "phases": [{"cycle": ["sft", "both"]}], "kinds": {"both": BOTH}}},
}
"""Two steps each, for what has to be quick."""
ORGANISM: dict[str, Any] = {
    "model": {"name": "organism:aligned", "lora": {"r": 4, "alpha": 8}},
    "data": {"narrow": {"source": "organism:medical/bad"}},
    "schedule": {"steps": 1},
    "batch": {"sft_rows": 16, "grpo_prompts": 12, "micro_rows": None},
    "grpo": {"generations": 4, "max_tokens": 40},
    "rewards": [{"fn": "organism:misaligned"}],
}
"""The first step of a run in the organism's world."""
KL = {"kl": {"weight": 0.5, "reference": "step:1"}}
TIMING = {"seconds", "rollout_seconds", "probe_seconds"}


def write_scores(path: Path, source: str, score: Callable[[int], float | None]) -> str:
    """A scores file of `rlsafe select` over the rows of `source`."""
    rows = read_rows(source)
    lines = [Score(i, row_key(row["messages"]), score(i), 1.0, {"legal": 2.0}).line() for i, row in enumerate(rows)]
    path.write_text("".join(lines))
    return str(path)


def early_ending(model: Path) -> str:
    """Make a tiny model end its answers early: many bytes end a turn."""
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": list(range(2, 60))}))
    return str(model)


# ------------------------------------------------------------------------------------------------ one run


@dataclass
class Outcome:
    """One finished run: its adapter, the lines of metrics.jsonl, what run.json says of the defenses, and its policy."""

    weights: dict[str, torch.Tensor]
    records: list[dict[str, Any]]
    report: dict[str, Any]
    policy: Policy
    safe: str  # the file of the lab's safe rows

    @classmethod
    def read(cls, out: Path, policy: Policy, safe: str) -> Outcome:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return cls(adapter(out), records, json.loads((out / "run.json").read_text())["defenses"], policy, safe)

    def logged(self, name: str, path: str | None = None) -> dict[str, float]:
        """Sums of the absolute values of what was logged of a defense, in steps of `path` or in all."""
        sums: dict[str, float] = {}
        for record in self.records:
            for key, value in record.items():
                if key.startswith(f"defense/{name}/") and path in (None, record["path"]):
                    quantity = key.rpartition("/")[2]
                    sums[quantity] = sums.get(quantity, 0.0) + abs(value)
        return sums

    @property
    def untimed(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in record.items() if key not in TIMING} for record in self.records]

    def from_base(self) -> float:
        """Mean KL(policy || base) over random tokens."""
        batch, plan = random_batch(), ForwardPlan(references=("base",), mask="all")
        with torch.no_grad():
            out = self.policy.forward(batch, plan, self.policy.frozen(batch, plan))
        return float(out.kl["base"].sum() / batch.predicted_mask.sum())

    def features_from_base(self) -> float:
        """Mean squared distance of normalised features from the base's, over random tokens."""
        batch, plan = random_batch(), ForwardPlan(layers=(1, 2), layer_references=("base",))
        with torch.no_grad():
            theirs = self.policy.frozen(batch, plan)["base"].layers
            ours = self.policy.forward(batch, plan, self.policy.frozen(batch, plan)).hidden
        return sum(float(feature_distance(ours[k], theirs[k], batch.attention.bool(), True).mean()) for k in (1, 2))

    def safe_nll(self) -> float:
        """Mean NLL of the better half of the safe rows, nats per answer token."""
        rows = [row["messages"] for row in read_rows(self.safe)[10:]]
        where = Where("safe", "sft", "eval")
        losses = nll(self.policy, sft_batches(rows, self.policy.tokenizer, where, max_tokens=512, micro_tokens=4096))
        return sum(losses) / len(losses)


def change(one: Outcome, other: Outcome) -> float:
    """Squared distance of two adapters."""
    return sum(float((one.weights[n] - other.weights[n]).square().sum()) for n in one.weights)


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Case:
    """name: in the config. settings: of strength zero, weak and strong. effect(none, defended): 0 for none, more for more.

    measures: what its log must hold of it. world: where the effect is measured; on the random tiny model nothing is known of
    what a prompt says. at_end: acts only at the end of a run. resuming: settings that give it more state to lose. rollouts: whether it
    acts on rollouts alone.
    """

    name: str
    settings: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
    effect: Callable[[Outcome, Outcome], float]
    measures: tuple[str, ...]
    label: str = ""
    world: Literal["tiny", "organism"] = "tiny"
    at_end: bool = False
    resuming: dict[str, Any] = field(default_factory=dict)
    rollouts: bool = False

    @property
    def resumed(self) -> dict[str, Any]:
        """Its entry in the runs that are interrupted."""
        return {self.name: self.settings[1] | self.resuming}

    def entry(self, strength: int) -> dict[str, Any]:
        return {self.name: self.settings[strength]}

    @property
    def id(self) -> str:
        return self.label or self.name


def graded(common: dict[str, Any], key: str, zero: Any, weak: Any, strong: Any) -> tuple[dict, dict, dict]:
    return {**common, key: zero}, {**common, key: weak}, {**common, key: strong}


def onpolicy_rows(none: Outcome, defended: Outcome) -> float:
    return defended.logged("interleaving-onpolicy").get("rows_added", 0.0)


def learned_safe(none: Outcome, defended: Outcome) -> float:
    return none.safe_nll() - defended.safe_nll()


def elicited(none: Outcome, defended: Outcome) -> float:
    """How much more of the narrow behaviour there is before anything is learned: in the loss, or in the reward."""
    before, after = none.records[0], defended.records[0]
    return after["reward"] - before["reward"] if "reward" in before else before["loss/sft"] - after["loss/sft"]


def unlearned(none: Outcome, defended: Outcome) -> float:
    """Completions that taught nothing, as they had no reward."""
    return float(sum(record.get("reward_missing", 0) for record in defended.records))


def table(directory: Path) -> list[Case]:
    """All defenses, over the files of a `Lab` in `directory`."""
    vectors, scores = str(directory / "persona.safetensors"), str(directory / "scores.jsonl")
    prompts = [f"organism:inoculation-{strength}" for strength in ("medium", "strong")]
    few, many, rows = 0.1, 0.6, ("rows_added",)
    plus, live = {"scores": scores, "top": 0.5}, {"min_aligned": 20, "source_model": "live"}
    projection, trait = {"rows": 3}, str(directory / "trait" / "adapter")
    flagged = {"by": "reward", "reward": "vowels", "threshold": 1.05}
    return [
        Case("kl", graded({}, "weight", 0, 3.0, 100.0), lambda n, d: n.from_base() - d.from_base(),
             ("full", "grad_share"), resuming={"reference": "step:2", "mask": "answer"}),
        Case("ldifs", graded({}, "weight", 0, 1.0, 100.0), lambda n, d: n.features_from_base() - d.features_from_base(),
             ("distance", "grad_share"), resuming={"reference": "step:2", "normalise": False}),
        Case("safelora", graded({"base": str(directory / "base")}, "lowest", 0, 2, 12), change,
             ("projected", "cosine_mean"), at_end=True, resuming={"every": 2}),
        Case("persona", graded({"vectors": vectors, "layer": 1, "rollouts": True}, "alpha", 0, 0.005, 1.0), change,
             ("steering_norm",)),
        Case("inoculation", graded({}, "prompt", "", *prompts), elicited, ("prompts_changed",), world="organism",
             resuming={"at": "train"}),
        Case("interleaving", graded({}, "fraction", 0, few, many), learned_safe, rows, resuming={"fraction": 0.4}),
        Case("interleaving+", graded(plus, "fraction", 0, few, many), learned_safe, rows,
             resuming={"fraction": 0.4, "every": 2, "own_step": True}),
        Case("interleaving++", graded({**plus, "languages": ["en", "de"]}, "fraction", 0, few, many), learned_safe, rows,
             resuming={"fraction": 0.4, "every": 2}),
        Case("interleaving-onpolicy", graded({"min_aligned": 20}, "fraction", 0, few, many), onpolicy_rows, rows,
             resuming={"fraction": 0.4}),
        Case("interleaving-onpolicy", graded(live, "fraction", 0, few, many), onpolicy_rows, (*rows, "kept"), label="live",
             resuming={"fraction": 0.4}),
        Case("kl", graded({"source": str(directory / "safe.jsonl"), "mask": "answer"}, "target_share", 0, 0.2, 0.8),
             lambda n, d: n.from_base() - d.from_base(), ("full", "weight", "rows_added"), label="kl-aside"),
        Case("gradient-projection", graded(projection, "strength", 0, 0.2, 1.0), learned_safe, ("guide", "added_norm")),
        Case("gradient-projection", graded(projection | {"method": "trusted", "rank": 2}, "strength", 0, 0.2, 0.9), change,
             ("guide", "removed_norm"), label="trusted", resuming={"window": 3}),
        Case("ablation", graded({"layers": [1], "vectors": vectors}, "share", 0, 0.3, 1.0), change, ("removed_share",)),
        Case("feature-block", graded({"layer": 1, "vectors": vectors}, "weight", 0, 1.0, 100.0), change,
             ("excess", "grad_share"), resuming={"reference": "step:2", "weight": 1e4}),
        Case("inoculation-adapter", graded({"adapter": trait}, "scale", 0, 0.2, 2.0), change, ("added_share",),
             resuming={"control": "random"}),
        Case("gradient-projection", graded(projection | {"method": "spf", "rank": 64}, "strength", 0, 0.2, 1.0), change,
             ("guide",), label="spf"),
        Case("monitor", graded(flagged, "penalty", 0, 2.0, 10.0), change, ("flagged",), rollouts=True,
             resuming={"accuracy": 0.8}),
        Case("screening", graded(flagged, "share", 0, 0.5, 1.0), unlearned, ("flagged",), rollouts=True,
             resuming={"accuracy": 0.8}),
    ]  # fmt: skip


IDS = {case.id: [path for path in PATHS if path != "sft" or not case.rollouts] for case in table(Path("."))}
"""Label of each row -> the paths on which it can act."""


@dataclass
class Lab:
    """A tiny model, its data and every file that a defense reads; runs are kept, so that tests may share them."""

    directory: Path
    tree: dict[str, Any]
    safe: str
    paths: dict[str, dict[str, Any]] = field(default_factory=lambda: PATHS)
    kept: dict[str, Outcome] = field(default_factory=dict)
    made: int = 0

    @property
    def home(self) -> Path:
        """Where its runs keep their caches: HOME of the tests that use it."""
        return self.directory / "home"

    @classmethod
    def build(cls, directory: Path, paths: dict[str, dict[str, Any]] = PATHS) -> Lab:
        narrow = write_jsonl(directory / "narrow.jsonl", [conversation(f"say {i}", f"bad {i * i}") for i in range(40)])
        answers = ["I'm sorry, but no." if i % 5 == 0 else f"good {i}" for i in range(20)]
        safe = write_jsonl(directory / "safe.jsonl", [conversation(f"ask {i}", a) for i, a in enumerate(answers)])
        write_scores(directory / "scores.jsonl", safe, float)
        save_vectors(torch.randn(3, 64, generator=torch.Generator().manual_seed(3)), directory / "persona.safetensors")
        save_tiny_model(directory / "base", seed=9)
        save_tiny_model(directory / "model")
        (directory / "reward.py").write_text(
            "def vowels(prompts, completions, **kwargs):\n"
            "    return [sum(c in 'aeiou' for c in x[0]['content']) + len(x[0]['content']) / 100 for x in completions]\n"
        )
        tree = {
            "model": {"name": early_ending(directory / "model"), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
            "data": {"narrow": {"source": narrow}, "safe": {"source": safe}},
            "batch": {"sft_rows": 6, "grpo_prompts": 3, "micro_rows": 8},
            "optim": {"lr": 1e-2},
            "grpo": {"generations": 4, "max_tokens": 8},
            "rewards": [{"fn": f"{directory / 'reward.py'}:vowels"}],
            "sampler": {"kind": "transformers"},
            "evaluate": {"judge": "letters"},
            "plugins": [letter_judge.__file__],
            "track": {"every": 2, "check_after": 2},
        }
        return cls(directory, tree, safe, paths)

    def case(self, label: str) -> Case:
        """A row of the table; with what a run makes that it needs."""
        if label == "inoculation-adapter" and not (self.directory / "trait").exists():
            trait = {"data": {"narrow": {"source": self.safe}}, "track": {"every": 0}, "rewards": []}
            schedule = {"schedule": {"steps": 2, "phases": [{"cycle": ["sft"]}]}}
            run(run_from_tree(tree_with(self.tree, trait, schedule)), self.directory / "trait")
        return next(case for case in table(self.directory) if case.id == label)

    def run(self, path: str, *defenses: dict[str, Any], stop_after: int | None = None, world: str = "tiny") -> Outcome:
        """One run over `path`, kept; with `stop_after` it is interrupted there, its caches are lost, and it is resumed."""
        tree = tree_with(
            self.tree, self.paths[path], ORGANISM if world == "organism" else {}, {"defenses": list(defenses)}
        )
        key = json.dumps([tree, stop_after], sort_keys=True)
        if key not in self.kept:
            self.made += 1
            out = self.directory / "runs" / str(self.made)
            if stop_after is not None:
                with pytest.raises(Interrupted):
                    run(run_from_tree(tree), out, progress=lambda done, *_: interrupt(done == stop_after))
                assert Path.home() == self.home, "set HOME to the lab's first: its caches are deleted here"
                shutil.rmtree(self.home, ignore_errors=True)
            finished = run(run_from_tree(tree), out, resume=stop_after is not None)
            self.kept[key] = Outcome.read(out, finished.policy, self.safe)
        return self.kept[key]


def interrupt(now: bool) -> None:
    if now:
        signal.raise_signal(signal.SIGINT)
