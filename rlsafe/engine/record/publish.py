"""`rlsafe publish`: a finished run as a directory that others can load, with a model card; on request merged, on request pushed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.config import RunConfig, UserError, check_out, load_run
from rlsafe.config.damaged import damaged_record
from rlsafe.config.files import read_whole, replacing_directory
from rlsafe.config.lock import hold, releasing
from rlsafe.engine.record.card import model_card, public_name
from rlsafe.engine.record.checkpoint import naming
from rlsafe.types import RunError

if TYPE_CHECKING:
    from torch import Tensor

CARD = "README.md"


@dataclass
class Published:
    """What was written: the adapter (or model) with its card, the merged model, the address of the repository."""

    directory: Path
    merged: Path | None = None
    url: str | None = None

    def summary(self) -> list[str]:
        lines = [f"ready to share: {self.directory} ({CARD} says what it is; read it before you share it)"]
        lines += [f"merged model: {self.merged}"] if self.merged else []
        return lines + ([f"pushed: {self.url}"] if self.url else [])


@releasing
def publish(
    run: str | Path,
    to: str | None = None,
    merge: str | Path | None = None,
    out: str | Path | None = None,
    license: str = "other",
    public: bool = False,
) -> Published:
    """Write `run`'s adapter (after full fine-tuning: its model) with a card to `out` (default RUN/published).

    merge: also write the whole model, the adapter merged freshly into the untouched base, in the base's own files and dtype.
    to: push the directory to this hub repository, created private unless `public`. license: the card's license field.
    Raises UserError for a run that is not finished and for a hub that refuses.
    """
    source = Path(run)
    if not (source / "config.yaml").is_file():
        raise UserError(f"{source}: not a run directory (no config.yaml); expected one that `rlsafe train` wrote")
    record = read_whole(source / "run.json")
    if not (source / "run.json").is_file():
        raise UserError(
            f"{source}: has no run.json, of which the card is made; what it trained can be evaluated, but not published"
        )
    resume = f"go on with: rlsafe train {source}/config.yaml --out {source} --resume"
    if record is None:
        raise UserError(damaged_record(source, resume))
    if record.get("status") != "finished":
        raise UserError(f"{source}: the run is not finished; {resume}")
    config = load_run(source / "config.yaml")
    full = config.model.lora is None and config.model.adapter is None
    if full and merge is not None:
        raise UserError(f"--merge: {source} was fully fine-tuned: {source}/model is the whole model already")
    directory = Path(out) if out is not None else source / "published"
    check_out(directory)
    hold(directory)
    trained = source / ("model" if full else "adapter")
    if not trained.is_dir():
        raise UserError(f"{trained}: no such directory; expected what a finished run saves")
    _replace(trained, directory, model_card(source, config, license))
    done = Published(directory)
    if merge is not None:
        done.merged = _merge(config, source, Path(merge), model_card(source, config, license, merged=True))
    if to is not None:
        done.url = _push(directory, to, public)
    return done


def _replace(source: Path, directory: Path, card: str) -> None:
    """Make `directory` a copy of `source` with the card. UserError when it exists and was not written by this command."""
    if directory.exists() and not (directory / CARD).is_file():
        raise UserError(f"{directory}: exists and holds no {CARD}; choose another --out")
    with replacing_directory(directory) as building:
        shutil.copytree(source, building)
        _name_base(building / "adapter_config.json")
        (building / CARD).write_text(card, encoding="utf-8")


def _name_base(file: Path) -> None:
    """An adapter's base by its name alone: a path leads nowhere on another machine, and tells about this one."""
    if file.is_file():
        settings = json.loads(file.read_text("utf-8"))
        settings["base_model_name_or_path"] = public_name(str(settings.get("base_model_name_or_path") or ""))
        file.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ the merged model


def _merge(config: RunConfig, run: Path, directory: Path, card: str) -> Path:
    """The base's files with every adapted tensor replaced, and the card: all of it or, after an error, nothing."""
    from rlsafe.policy import Policy
    from rlsafe.policy.source import model_source
    from rlsafe.rollouts.engine import local_directory

    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--merge {directory}: is not empty; expected a new directory")
    base = Path(local_directory(model_source(config.model), config.model.revision))
    if json.loads((base / "config.json").read_text("utf-8")).get("quantization_config"):
        raise UserError(
            f"--merge: the files of {config.model.name} hold quantised weights, which an adapter cannot be merged into; publish the "
            "adapter without --merge, or train on the unquantised model"
        )
    # Of the base's files and on this machine's CPU: what the run itself computed with does not matter.
    as_stored = {"quantization": None, "dtype": _stored(base), "attention": "sdpa", "gradient_checkpointing": False}
    model = config.model.model_copy(update={"adapter": str(run / "adapter"), **as_stored})
    policy = Policy.load(model, path=str(base), seed=config.seed)
    with replacing_directory(directory.resolve()) as building:
        building.mkdir()
        _write_merged(base, dict(policy.merged_weights()), building, directory)
        for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
            if (base / name).is_file():
                shutil.copy(base / name, building / name)
        policy.tokenizer.save_pretrained(str(building))
        (building / CARD).write_text(card, encoding="utf-8")
    return directory


def _write_merged(base: Path, changed: dict[str, Tensor], building: Path, directory: Path) -> None:
    """The base's weights with those of `changed` in their place, one file at a time. An error names the file as it will be called in
    `directory`; RunError for a tensor that the base does not have."""
    from safetensors.torch import save_file

    from rlsafe.rollouts.engine import weight_files

    for file in weight_files(str(base)):
        tensors = {
            name: (changed.pop(name).to(tensor.dtype) if name in changed else tensor).contiguous()
            for name, tensor in _tensors(file)
        }
        with naming(directory / file.name):
            save_file(tensors, str(building / file.name), metadata={"format": "pt"})
    if changed:
        raise RunError(
            f"--merge: {base} holds no tensor named {next(iter(changed))}: its files name weights in another way"
        )


def _stored(base: Path) -> str:
    """The dtype to load the base in, which loses nothing of its files: bfloat16 where all of them hold it, else float32."""
    from safetensors import safe_open

    from rlsafe.rollouts.engine import weight_files

    found: set[str] = set()
    for file in weight_files(str(base)):
        with safe_open(str(file), framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - not a mapping
    return "bfloat16" if found == {"BF16"} else "float32"


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            yield name, tensors.get_tensor(name)


# ------------------------------------------------------------------------------------------------ the hub


def _push(directory: Path, to: str, public: bool) -> str:
    from huggingface_hub import HfApi

    try:
        api: Any = HfApi()
        where = api.create_repo(to, private=not public, exist_ok=True)
        api.upload_folder(repo_id=where.repo_id, folder_path=directory, commit_message="Add adapter and model card")
    except Exception as error:  # a wrong name, missing rights or the network
        line = " ".join(str(error).split())[:300]
        hint = "; log in with `hf auth login`" if "401" in line or "token" in line.lower() else ""
        raise UserError(
            f"--to {to}: the hub refuses: {line}{hint}; {directory} is ready to be uploaded by hand"
        ) from None
    return str(where)
