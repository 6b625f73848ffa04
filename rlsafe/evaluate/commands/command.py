"""`rlsafe evaluate RUN_OR_MODEL`: build the policy, the sampler and the judge, then evaluate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import (
    LikelihoodConfig,
    RunConfig,
    UserError,
    check_out,
    load_run,
    nearest,
)
from rlsafe.config.files import run_record
from rlsafe.config.gguf import gguf_file, is_gguf
from rlsafe.config.lock import hold, releasing
from rlsafe.config.reads import EVALUATION, check_read
from rlsafe.evaluate.ask.journal import identity
from rlsafe.evaluate.ask.system_turns import Position, placed
from rlsafe.evaluate.commands.rejudging import expected
from rlsafe.evaluate.commands.targets import without_a_run
from rlsafe.evaluate.measure.evaluation import OTHER_KEYS, Evaluation
from rlsafe.evaluate.measure.likelihood import Reader
from rlsafe.evaluate.measure.measure import Material, Progress, evaluate_run, gather
from rlsafe.types import BackgroundJudge, Message, Question, Sampler, provider_for

if TYPE_CHECKING:
    from rlsafe.policy import Policy

SELF_TEST_PROMPTS = 4


@releasing
def evaluate(
    target: str | Path,
    questions: Sequence[str | Path] = (),
    judge: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | str | None = None,
    progress: Progress | None = None,
    first: bool = True,
) -> Evaluation:
    """Evaluate a run directory (config.yaml and adapter/) or a model (hub id, directory, `provider:name`).

    questions: the first file becomes the general set, each further one a set named by the file's stem (`indomain.yaml`
        and `medical.yaml` give `indomain` and `medical`). judge: replaces `evaluate.judge`.
    overrides: `key.path=value` on the run's config; for a model, on a config that names only the model. One that an evaluation does
        not read is a UserError.
    out: default RUN itself, or runs/evaluate-MODEL. A provider's model is by default asked its provider's own
        questions. first: a judge that cannot be reached is a UserError (False: it was tested before).
    """
    check_read(overrides, EVALUATION, "an evaluation")
    config, run = resolve(target, judge, overrides)
    material = gather(
        config.evaluate, extra=named_sets(questions)
    )  # before the model is loaded, so that errors come at once
    directory = Path(out) if out else run or Path("runs") / f"evaluate-{_file_name(str(target))}"
    check_out(directory)
    hold(directory)
    if first and isinstance(material.judge, BackgroundJudge):
        earlier = (expected(one, config.evaluate, material) for one in (directory, run) if one)
        material.judge.check(first=True, asked=next(filter(None, earlier), None))
    if first and material.narrow:
        material.narrow.check()
    sampler: Sampler | None = None
    if material.asks:
        sampler, policy = load_sampler(
            config, run, _conversations(material, config.evaluate.position), "before evaluation"
        )
    else:
        policy, _ = load_policy(config, run)
    return evaluate_run(
        sampler, policy.tokenizer, config.evaluate, directory, progress=progress, material=material,
        weights=identity(config, run), reader=reader_of(config, policy, read_back=run is not None, model=run is None),
    )  # fmt: skip


def reader_of(
    config: RunConfig, policy: Policy, *, read_back: bool = False, whole: bool = True, model: bool = False
) -> Reader | None:
    """Reads likelihoods off `policy` and off what it was before training: its adapter off, or its first weights.

    read_back: the policy was read from a finished run. Fully fine-tuned it then no longer has its first weights (nor has one that
    is sharded): the model that the settings name is loaded when it is asked for. whole: False for shards that are not gathered,
    which one rank alone cannot read: None. model: no run, but what its settings name was loaded.
    """
    if policy.is_sharded and not whole:
        return None
    forgot = not policy.is_lora and (read_back or policy.is_sharded)
    load = partial(_first_of, config) if forgot else None
    untouched = (model or not config.schedule.steps) and config.model.adapter is None
    return Reader(policy, config.batch.micro_tokens, config.batch.micro_rows, load, untouched)


def _first_of(config: RunConfig) -> Policy:
    return load_policy(config, None)[0]


def resolve(target: str | Path, judge: str | None, overrides: Sequence[str]) -> tuple[RunConfig, Path | None]:
    """(the settings behind a target, its run directory if it is one), with its plug-ins loaded."""
    from rlsafe.defenses.registry import load_module

    run = run_directory(target)
    config = load_run(run / "config.yaml", overrides) if run else without_a_run(str(target), overrides)
    if run and overrides:
        _check_own(config, load_run(run / "config.yaml"), run)
    for plugin in config.plugins:  # before names are looked up: a plug-in may register a provider
        load_module(plugin)
    if run is None:
        config = _with_provider_defaults(config)
    if judge:
        config = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"judge": judge, "judges": {}})}
        )
    return config, run


def _check_own(config: RunConfig, own: RunConfig, run: Path) -> None:
    """UserError for overrides that name another adapter, or other settings of one, than the run's own, which is what is loaded."""
    now, then = (
        {"adapter": one.model.adapter, "lora": one.model.lora and one.model.lora.model_copy(update={"fused": None})}
        for one in (config, own)
    )
    if other := [name for name, value in now.items() if value != then[name]]:
        raise UserError(
            f"override of model.{other[0]}: {run} has its own {'model' if own.model.lora is None else 'adapter'}, as it was trained; "
            "expected a run without it, or `rlsafe evaluate MODEL model.adapter=DIR`, which measures another adapter"
        )


def named_sets(questions: Sequence[str | Path]) -> dict[str, str]:
    """Set name -> source: the first is `general`, the others are called by their stem. UserError for two sets of one name."""
    named: dict[str, str] = {}
    for source in map(str, questions):
        name = Path(source).stem if named else "general"
        if name in named or name in ("conditional", *OTHER_KEYS):
            raise UserError(f"--questions {source}: a set cannot be named {name!r} here; rename the file")
        named[name] = source
    return named


def run_directory(target: str | Path) -> Path | None:
    """The target as a run directory; None when it is a model. UserError when it is a directory of neither kind."""
    path = Path(target)
    if is_gguf(str(target)):
        gguf_file(str(target))
        return None
    if path.is_file():
        raise UserError(f"{path}: is a file; expected a run directory, a model directory, a GGUF file or a hub id")
    if not path.is_dir():
        parent = path.parent
        if path.is_absolute() or str(target).startswith((".", "~")) or (parent != Path(".") and parent.is_dir()):
            beside = [str(parent / one.name) for one in parent.iterdir() if one.is_dir()] if parent.is_dir() else []
            raise UserError(f"{path}: no such run or model directory{nearest(str(path), beside)}")
        return None
    if (path / "config.yaml").is_file():
        return path
    if (path / "config.json").is_file():
        return None
    raise UserError(f"{path}: neither a run directory (no config.yaml) nor a model (no config.json)")


def _with_provider_defaults(config: RunConfig) -> RunConfig:
    """A model that comes from a provider is asked that provider's general questions and judged by its judge."""
    found = provider_for(config.model.name)
    if not found:
        return config
    name = config.model.name.partition(":")[0]
    settings = config.evaluate
    changes: dict[str, Any] = {}
    if settings.judge is None:
        changes["judge"] = name
    if not settings.wanted:
        changes["general"] = f"{name}:general"
        if hasattr(found[0], "pairs"):
            changes["likelihood"] = LikelihoodConfig(general=f"{name}:pairs/general")
    if "max_tokens" not in settings.model_fields_set:  # the default is for models of a longer context
        shape = json.loads((Path(found[0].model(found[1])) / "config.json").read_text(encoding="utf-8"))
        changes["max_tokens"] = min(settings.max_tokens, shape.get("max_position_embeddings", 2048) // 4)
    return config.model_copy(update={"evaluate": settings.model_copy(update=changes)})


def load_policy(config: RunConfig, run: Path | None) -> tuple[Policy, str]:
    """The model that `config` names, or the one that `run` trained, and the directory or hub id of its weights.

    UserError when a run directory lacks what it trained, or has it from an earlier, shorter run while a longer one is under way.
    """
    from rlsafe.policy.source import model_source

    model, path = config.model, model_source(config.model)
    if run is not None:
        saved = run / ("model" if model.lora is None else "adapter")
        if not saved.is_dir():
            raise UserError(f"{run}: has no {saved.name}/; the run is not finished (go on with rlsafe train --resume)")
        # Without a record it is only asked for its weights, whoever trained them.
        record = run_record(run)
        if record and record.get("status") != "finished":
            raise UserError(
                f"{run}: the run is not finished, its {saved.name}/ is of a shorter one before it (go on with rlsafe train --resume)"
            )
        if model.lora is None:  # full fine-tuning: the whole model
            path = str(saved)
        else:
            model = model.model_copy(update={"adapter": str(saved)})
    import torch

    from rlsafe.policy import Policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Policy.load(model, path=path, seed=config.seed, device=device), path


def load_sampler(
    config: RunConfig, run: Path | None, asked: Iterable[list[Message]], when: str, seed: int | None = None
) -> tuple[Sampler, Policy]:
    """The policy of `load_policy` and its sampler, compared on the first few conversations that will be asked.

    when: for the message of that test. seed: of the sampler and its test, default the config's.
    """
    from rlsafe.data import encode_prompt
    from rlsafe.rollouts import make_sampler, self_test

    policy, path = load_policy(config, run)
    seed = config.seed if seed is None else seed
    sampler = make_sampler(config.sampler, path, policy, seed)
    if config.sampler.self_test:
        prompts = [encode_prompt(policy.tokenizer, messages) for messages in islice(asked, SELF_TEST_PROMPTS)]
        self_test(sampler, policy, prompts, seed, config.sampler.max_gap, when)
    return sampler, policy


def as_messages(questions: Iterable[Question]) -> Iterator[list[Message]]:
    """Each question as a conversation, by its first paraphrase."""
    return ([{"role": "user", "content": question.paraphrases[0]}] for question in questions)


def _conversations(material: Material, position: Position) -> Iterator[list[Message]]:
    """What an evaluation asks: its questions, its benign tasks, then held-out prompts."""
    from rlsafe.data import split_prompt

    yield from as_messages(chain.from_iterable(material.questions.values()))
    rows = chain(*material.tasks.values(), material.narrow.rows if material.narrow else ())
    yield from (placed(split_prompt(row)[0], position) for row in rows)


def _file_name(target: str) -> str:
    """A target as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", target).strip("-.") or "model"
