"""The settings of a comparison: what all its runs have in common, and what differs between them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from rlsafe.config.base import NonNegative, Recorded, Seed, Settings, invalid_at

Tree = dict[str, Any]


class BenignConfig(Settings):
    """The criterion "learns benign tasks": each defense also trains on a benign task instead of the narrow one.

    A task's tree says what is trained on (data, rewards) and, in `evaluate.benign`, the test sets that score it; several test sets
    are averaged. These runs answer no other questions.
    """

    task: str = Field(description="the task whose score fills the 'benign' column")
    tasks: dict[str, Tree] = Field(
        description="task -> overrides of the run (data, rewards, schedule, evaluate.benign)"
    )
    paths: dict[str, Tree] = Field(
        default_factory=dict, description="path -> overrides of the run when training on a task"
    )
    warmup: Tree | None = Field(
        None,
        description="the shared warm-up of these runs, one for each task; null = the comparison's own section, if any",
    )
    seeds: list[Seed] | None = Field(None, description="null = the comparison's seeds")

    @model_validator(mode="after")
    def _task_is_known(self) -> BenignConfig:
        if self.task not in self.tasks:
            raise ValueError(f"'task' names no entry of 'tasks' ({', '.join(self.tasks) or 'none given'})")
        return self


def _dotted(tree: Any) -> Any:
    """{kl: {weight: [...]}} -> {kl.weight: [...]}: an override `grid.kl.weight=[...]` nests."""
    if not isinstance(tree, dict):
        return tree
    flat: dict[Any, Any] = {}
    for key, value in tree.items():
        inner = _dotted(value)
        flat |= {f"{key}.{rest}": one for rest, one in inner.items()} if isinstance(inner, dict) else {key: inner}
    return flat


def _no_defense() -> dict[str, list[str | dict[str, Any]]]:
    return {"none": []}


class SelectionConfig(Settings):
    """How `scores: auto` of interleaving+ and ++ is made: helper models, each misaligned on one domain, that score the safe rows.

    A helper that trains on the comparison's own narrow data is left out (leave-target-out), so one list serves every target.
    """

    adapters: dict[str, str] = Field(
        min_length=1, description="label -> source of the misaligned rows that a helper trains on"
    )
    run: Tree = Field(default_factory=dict, description="overrides of the run for every helper, such as its schedule")
    eps: Annotated[float, Field(gt=0)] = Field(1.0, description="added to the denominator of a row's score")
    seed: Seed = Field(0, description="of the helpers' runs")


class CompareConfig(Recorded):
    """A grid of runs: models x paths x defenses x seeds, evaluated and turned into verdicts.

    `run` holds what all cells share; `paths`, `models`, `defenses` hold what differs (trees of RunConfig keys, deep-merged in the
    order run < path < model < reference arm or benign task < defense < command line). A defense is a list as in RunConfig.defenses.
    """

    title: str = Field("", description="of the report")
    run: Tree = Field(description="settings of a run that all cells share")
    models: dict[str, Tree] = Field(
        default_factory=dict, description="label -> overrides; default: the run's own model"
    )
    paths: Annotated[dict[str, Tree], Field(min_length=1)] = Field(description="path -> overrides of the run")
    default_paths: list[str] | None = Field(None, description="the paths that run without --paths; null = all")
    defenses: dict[str, list[str | dict[str, Any]]] = Field(
        default_factory=_no_defense, min_length=1, description="label -> what it combines, as a run's defenses"
    )
    default_defenses: list[str] | None = Field(
        None, description="the labels that run without --defenses; null = all, which --defenses all names too"
    )
    seeds: list[Seed] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1, description="one run of each cell for each"
    )
    narrow: bool = Field(True, description="false = only the benign tasks, no narrow runs")
    relapse: NonNegative = Field(0, description="undefended steps after each narrow run: does misalignment come back?")
    warmup: Tree | None = Field(
        None, description="overrides of a run without defenses that every arm of every path starts from, trained once"
    )
    aligned: Tree | None = Field(None, description="overrides of the reference arm trained on aligned narrow data")
    benign: BenignConfig | None = None
    selection: SelectionConfig | None = Field(None, description="how safe rows are scored for interleaving+ and ++")
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_dotted)] = Field(
        default_factory=dict, description="settings to sweep: kl.weight: [0.03, 0.1], or nested: kl: {weight: [...]}"
    )
    quick: Tree = Field(default_factory=dict, description="overrides of this file for `--quick`")
    overrides: list[str] = Field(
        default_factory=list,
        description="key.path=value, applied last to every cell, but for data and rewards that its arm or task sets itself",
    )
    _marks: dict[tuple[str, ...], str] = PrivateAttr(default_factory=dict)
    """Where each key was written, so that an error in a cell can name the line."""
    _source: str = PrivateAttr(default="config")

    @model_validator(mode="after")
    def _cells_have_their_own(self) -> CompareConfig:
        """Refuse keys that every cell sets itself: given here they would be ignored."""
        trees: list[tuple[tuple[str, ...], Tree]] = [(("run",), self.run), (("aligned",), self.aligned or {})]
        trees += [(("paths", name), tree) for name, tree in self.paths.items()]
        trees += [(("models", name), tree) for name, tree in self.models.items()]
        trees += [(("warmup",), self.warmup or {})]
        if self.benign is not None:
            trees += [(("benign", "warmup"), self.benign.warmup or {})]
            trees += [(("benign", "tasks", name), tree) for name, tree in self.benign.tasks.items()]
            trees += [(("benign", "paths", name), tree) for name, tree in self.benign.paths.items()]
        if self.selection is not None:
            trees += [(("selection", "run"), self.selection.run)]
        for keys, tree in trees:
            if "out" in tree:
                raise invalid_at((*keys, "out"), tree["out"], "each cell has its own directory; use --out")
            if "seed" in tree:
                message = "each cell sets its own seed; use seeds: [...] or --seeds"
                raise invalid_at((*keys, "seed"), tree["seed"], message)
            if tree.get("defenses"):
                message = "each cell sets its own defenses; use defenses: {label: [...]} of the comparison"
                raise invalid_at((*keys, "defenses"), tree["defenses"], message)
        if twice := [seed for place, seed in enumerate(self.seeds) if seed in self.seeds[:place]]:
            raise invalid_at(("seeds",), self.seeds, f"{twice[0]} is there twice; name each once")
        return self
