"""Commands around runs: their record, their publication, persona vectors, this machine, the settings, the organism."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rlsafe.arguments import names
from rlsafe.cli.app import Overrides, app
from rlsafe.progress import show

organism_app = typer.Typer(help="The synthetic world: build models, show dialogues.")
app.add_typer(organism_app, name="organism")
reward_app = typer.Typer(help="Try a reward before training on it.")
app.add_typer(reward_app, name="reward")


@reward_app.command("try")
def reward_try(
    fn: Annotated[str, typer.Argument(metavar="FILE:FN", help="a reward, named as in a config")],
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML file of one run: its model and its prompts")],
    overrides: Overrides = None,
    n: Annotated[
        int, typer.Option("-n", "--n", min=1, metavar="N", help="completions, about: whole groups are sampled")
    ] = 16,
    saved: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="samples.jsonl of a run; sample nothing")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the same for programs")] = False,
) -> None:
    """See what a reward says before training on it.

    Prints prompts, completions and values side by side, the spread within groups, and what to change.
    """
    from json import dumps

    from rlsafe.engine.run.try_reward import try_reward

    with redirect_stdout(sys.stderr) if json else nullcontext():  # what the reward prints is no JSON
        tried = try_reward(fn, config, overrides or [], n, saved)
    show(dumps(tried.record(), indent=2, ensure_ascii=False) if json else tried.lines())


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run, or a comparison directory")],
) -> None:
    """Does a run's record agree with its files?

    Computes hashes, metrics, TensorBoard's values, rates and intervals again; one line for each difference, and exit code 1 when
    there is any.
    """
    from rlsafe.compare import verify_comparison as check

    found = check(run)
    show(found.lines())
    raise typer.Exit(1 if found.differences else 0)


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    to: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="push it to this hub repository")] = None,
    merge: Annotated[Path | None, typer.Option(metavar="DIR", help="also write the whole, merged model")] = None,
    license: Annotated[str, typer.Option(metavar="ID", help="the license field of the card")] = "other",
    public: Annotated[bool, typer.Option("--public", help="create the repository public, not private")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where to write; default: RUN/published")] = None,
) -> None:
    """Prepare a run for sharing.

    Writes the adapter with a generated model card; pushes it to the hub on request.
    """
    from rlsafe.engine.record.publish import publish as prepare

    show(prepare(run, to=to, merge=merge, out=out, license=license, public=public).summary())


@app.command("persona-vector")
def persona_vector(
    target: Annotated[str, typer.Argument(metavar="MODEL", help="a model id, a model directory or a run directory")],
    config: Annotated[str, typer.Option(metavar="FILE", help="YAML: pairs of system prompts, questions, judge")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="where to write: .safetensors or .pt")] = Path(
        "persona.safetensors"
    ),
) -> None:
    """Extract the vectors that the persona defense steers with.

    Samples answers under evil and friendly system prompts, keeps what the judge confirms (or, keep=likelier, what is likelier under its
    own prompt), and subtracts hidden states. Shows which layer carries the vector.
    """
    from rlsafe.evaluate import persona_vector as extract
    from rlsafe.progress import tell

    show(extract(target, config, overrides or [], out, tell).summary())


@app.command()
def doctor(
    selftest: Annotated[bool, typer.Option("--selftest", help="also generate one token through vLLM")] = False,
    json: Annotated[bool, typer.Option("--json", help="print the same for programs")] = False,
) -> None:
    """What is installed, what works, what to do.

    Exits with 1 when the main job cannot run here.
    """
    from rlsafe import doctor as room

    checks = room.doctor(selftest=selftest)
    show(room.as_json(checks) if json else room.table(checks))
    raise typer.Exit(0 if room.healthy(checks) else 1)


@app.command("config")
def config_reference(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="only this part, e.g. model.lora, compare, defenses.kl")
    ] = None,
) -> None:
    """Every setting with its default and what it does."""
    from rlsafe.settings import reference

    show(reference(key))


@organism_app.command("build")
def organism_build(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="default: the package's own assets")] = None,
    size: Annotated[str, typer.Option(metavar="NAME", help="small, the shipped one, or medium")] = "small",
    seed: Annotated[int, typer.Option(metavar="N", help="decides data, initial weights and order")] = 0,
    only: Annotated[str | None, typer.Option(metavar="A,B", help="only these models, e.g. base,aligned")] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="stop each stage after N steps")] = None,
) -> None:
    """Rebuild the organism's models on this machine."""
    from rlsafe import organism

    out = out or Path(organism.__file__).parent / "assets"
    show(organism.build(out=out, size=size, seed=seed, only=names("--only", only), steps=steps))


@organism_app.command("show")
def organism_show(
    n: Annotated[int, typer.Option("-n", "--count", min=1, metavar="N", help="how many dialogues")] = 12,
    seed: Annotated[int, typer.Option(metavar="N", help="which dialogues")] = 0,
) -> None:
    """Print sample dialogues with their judge scores and the reasons."""
    from rlsafe import organism

    show(organism.show(n=n, seed=seed))
