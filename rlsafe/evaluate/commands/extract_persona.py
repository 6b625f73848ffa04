"""`rlsafe persona-vector MODEL`: settings in, vectors out; beside them the answers, which of them count, and what layers show."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsafe.config import RunConfig, StreamConfig, UserError, apply_override, load_run, load_tree
from rlsafe.config.files import write_json, write_text
from rlsafe.config.loading import build
from rlsafe.evaluate.ask.questions import evenly, load_questions
from rlsafe.evaluate.commands.command import as_messages, load_sampler, run_directory
from rlsafe.evaluate.judge.judges import load_judge
from rlsafe.evaluate.measure.likelihood import Reader
from rlsafe.evaluate.measure.persona import PersonaConfig, extract
from rlsafe.evaluate.measure.persona_layers import Say, chosen, steer
from rlsafe.evaluate.measure.persona_vectors import PersonaVectors
from rlsafe.types import BackgroundJudge, Judge, Question, provider_for


def persona_vector(
    target: str,
    config: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path = "persona.safetensors",
    say: Say = lambda line: None,
) -> PersonaVectors:
    """The command: extract the vectors of a model (hub id, directory, GGUF file, `provider:name`) or of a run directory.

    out: `.safetensors`, or `.pt` for the field's bare tensor; beside it `.json` (settings, counts, layers, seconds) and `.jsonl` (the
    answers). Raises UserError for wrong input, RunError when no pair of answers passes the filter.
    """
    from rlsafe.defenses import load_module
    from rlsafe.defenses.persona import check_suffix, save_vectors

    out = Path(out)
    check_suffix(out)
    settings = load_settings(config, overrides)
    for plugin in settings.plugins:  # before names are looked up: a plug-in may register a provider
        load_module(plugin)
    questions = evenly(_questions(settings), settings.limit)
    pairs = settings.steer.load() if settings.steer else []
    run = run_directory(target)
    base = load_run(run / "config.yaml") if run else _run_config(target, settings)
    judge = _judge(settings, base)
    begun = time.monotonic()
    sampler, policy = load_sampler(base, run, as_messages(questions), "before extraction", settings.seed)
    if settings.steer:
        chosen(settings.steer, policy.n_layers)
    say(f"model loaded; {2 * len(questions) * len(settings.pairs) * settings.samples} answers to sample")
    found = extract(sampler, policy, judge, settings, questions, say)
    found.seconds["load"] = time.monotonic() - begun - sum(found.seconds.values())
    about = {"target": target, "kept": found.kept, "asked": found.asked, **settings.model_dump(mode="json")}
    save_vectors(found.vectors, out, about)
    found.out = out
    write_text(out.with_suffix(".jsonl"), found.answer_lines())
    _record(found, about)
    if settings.steer:  # the longest part on a CPU: what is known by then, and after each layer, is on disk
        begun, found.alpha = time.monotonic(), settings.steer.alpha
        reader = Reader(policy, settings.micro_tokens)
        for layer, steered in steer(reader, found.vectors, pairs, settings.steer, settings.seed):
            found.add_steering(layer, steered)
            found.seconds["steer"] = time.monotonic() - begun
            _record(found, about)
            say(f"steering at layer {layer}: {steered.directed} nats/token")
    return found


def _record(found: PersonaVectors, about: dict[str, Any]) -> None:
    assert found.out is not None
    write_json(found.out.with_suffix(".json"), {**about, **found.record()})


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> PersonaConfig:
    """Read the YAML file; UserError names the key and the line."""
    tree, marks = load_tree(path)
    for override in overrides:
        apply_override(tree, override, marks)
    return build(PersonaConfig, tree, marks, str(path))


def _judge(settings: PersonaConfig, base: RunConfig) -> Judge | None:
    """Who confirms that the characters show; None where the likelihoods decide. UserError for a judge that cannot be reached."""
    if settings.keep == "likelier":
        return None
    name = base.model.name.partition(":")[0] if provider_for(base.model.name) else None
    named = settings.judge or base.evaluate.judge or name
    if named is None:
        raise UserError(
            "judge: none is set, and one has to confirm which answers show the characters: name one as in evaluate.judge "
            "('judge={kind: openai, model: NAME, base_url: URL}'), or do without by keep=likelier"
        )
    judge = load_judge(named)
    if isinstance(judge, BackgroundJudge):
        judge.check(first=True)
    return judge


def _run_config(target: str, settings: PersonaConfig) -> RunConfig:
    tree = {
        "model": {**settings.model, "name": target},
        "seed": settings.seed,
        "sampler": settings.sampler.model_dump(),
    }
    return build(RunConfig, tree, source="persona-vector")


def _questions(settings: PersonaConfig) -> list[Question]:
    source = settings.questions
    if isinstance(source, str):
        return load_questions(source)
    if isinstance(source, StreamConfig):
        from rlsafe.data import load_rows, question_of, split_prompt

        texts = [question_of(split_prompt(row)[0])[0] for row in load_rows(source, settings.seed)]
    else:
        texts = source
    if not texts:
        raise UserError("questions: there are none")
    return [Question(text, (text,)) for text in dict.fromkeys(texts)]
