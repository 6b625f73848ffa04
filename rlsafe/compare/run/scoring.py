"""Scoring safe rows for interleaving+ and ++: train the helper adapters, take every row's NLL, write s_d.

Everything is kept as it is made (OUT/adapters/LABEL, OUT/nll/*.jsonl), so the same call goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsafe.compare.grid.grid import selection_of
from rlsafe.compare.grid.selection import FILE, Selection, fingerprint, helper_run
from rlsafe.config import RunConfig, UserError, check_out, load_compare
from rlsafe.config.files import read_whole, write_json, write_text
from rlsafe.config.lock import hold, releasing
from rlsafe.data import encoded_row, is_refusal, read_rows, with_answers
from rlsafe.data.selection_scores import Score, read_scores, row_key, selection_score
from rlsafe.evaluate.measure.hashing import digest
from rlsafe.types import Interrupted, Row, Where

if TYPE_CHECKING:
    from rlsafe.engine import Resources
    from rlsafe.policy import Policy

CHUNK = 512  # rows between two writes
_RECORD = "selection.json"
Say = Callable[[str], None]


@dataclass
class Selected:
    """A scores file and the rows that were scored; `.table()` shows the best."""

    file: Path
    scores: list[Score]
    rows: list[Row]

    def table(self, top: int = 10) -> Any:
        """The `top` rows by s_d as a rich renderable, with how many rows there are and how many of them refuse."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        best = sorted((s for s in self.scores if s.s is not None), key=lambda score: -(score.s or 0.0))
        table = Table("s_d", "NLL aligned", "NLL misaligned", "refusal", "question", "answer")
        refusals = 0
        for place, score in enumerate(best):
            *asked, answer = self.rows[score.row]["messages"]
            refusals += (refuses := is_refusal(answer["content"]))
            if place < top:
                misaligned = ", ".join(f"{label} {value:.2f}" for label, value in score.misaligned.items())
                texts = [escape(" ".join(message["content"].split())[:100]) for message in (asked[-1], answer)]
                table.add_row(f"{score.s:.3f}", f"{score.aligned:.2f}", misaligned, "yes" if refuses else "", *texts)
        left = len(self.scores) - len(best)
        line = f"{len(best)} rows scored, {refusals} of them refusals" + (f"; {left} too long" if left else "")
        return Group(table, f"{line}: {self.file}")


@releasing
def select(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    quick: bool = False,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
    say: Say = lambda what: None,
) -> Selected:
    """`rlsafe select`: score the safe rows of a comparison's config by its `selection` section.

    out: default `runs/select-<name of the config>`; finished helpers and scores there are kept, so the same call also
    resumes. progress: the engine's, of the helper that trains. Raises UserError, or Interrupted on Ctrl-C.
    """
    config = load_compare(config_path, overrides, quick)
    selection = selection_of(config)
    directory = Path(out or Path("runs") / f"select-{Path(config_path).stem}")
    check_out(directory)
    hold(directory)
    if directory.is_dir() and any(directory.iterdir()) and not (directory / _RECORD).is_file():
        raise UserError(f"--out {directory}: holds something else; choose an empty or new directory")
    try:
        make_scores(selection, directory, say=say, progress=progress)
    except (KeyboardInterrupt, Interrupted):
        words = [
            "rlsafe",
            "select",
            str(config_path),
            *overrides,
            *(["--quick"] if quick else []),
            "--out",
            str(directory),
        ]
        raise Interrupted(f"what is done is kept in {directory}; go on with: {shlex.join(words)}") from None
    return Selected(directory / FILE, read_scores(directory / FILE), _pool(selection))


def check(selection: Selection) -> None:
    """UserError for anything wrong with the helpers' rewards or data, or the safe rows, before anything runs."""
    from rlsafe.engine.run.build import Resources, prepare
    from rlsafe.engine.run.contact import contact

    resources = Resources()
    for label, config in selection.helpers.items():
        try:
            contact(prepare(config), resources)
        except UserError as error:
            raise UserError(f"selection.adapters.{label}: {error}") from None
    if selection.scored:
        _pool(selection)


def _pool(selection: Selection) -> list[Row]:
    """The safe rows to score. UserError for one without an answer, unless such rows are to be skipped."""
    return with_answers(read_rows(selection.pool), selection.pool.source, selection.pool.on_bad_row)


def make_scores(
    selection: Selection,
    out: Path,
    *,
    work: Path | None = None,
    resources: Resources | None = None,
    say: Say = lambda what: None,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> Path:
    """The path of OUT/scores.jsonl, made unless it exists. Helpers and NLLs of an earlier call are reused if still valid.

    work: where helpers and NLLs are (default: OUT); selections that differ in `eps` only can share it.
    """
    if (read_whole(out / _RECORD) or {}).get("key") == selection.key and (out / FILE).is_file():
        return out / FILE
    write_json(out / _RECORD, {"key": None, "left_out": list(selection.left_out)})
    adapters = train_helpers(selection, work or out, resources, say, progress)
    rows = _pool(selection)
    keys = [row_key(row["messages"]) for row in rows]
    aligned, misaligned = _all_nlls(selection, work or out, dict(zip(keys, rows, strict=True)), adapters, say)
    lines = []
    for index, key in enumerate(keys):
        theirs = {label: found[key] for label, found in misaligned.items() if key in found}
        s = selection_score(list(theirs.values()), aligned[key], selection.eps) if key in aligned else None
        lines.append(Score(index, key, s, aligned.get(key), theirs).line())
    write_text(out / FILE, "".join(lines))
    write_json(out / _RECORD, {"key": selection.key, "left_out": list(selection.left_out)})
    return out / FILE


def train_helpers(
    selection: Selection,
    work: Path,
    resources: Resources | None = None,
    say: Say = lambda what: None,
    progress: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> dict[str, Path]:
    """Label -> the adapter (or fully trained model) of each helper, in WORK/adapters/LABEL; finished ones are kept."""
    check(selection)
    adapters = {}
    for label, config in selection.helpers.items():
        say(f"helper {label}: training")
        adapters[label] = train_once(config, helper_run(work, label), resources, progress)
    return adapters


def train_once(
    config: RunConfig,
    where: Path,
    resources: Resources | None,
    progress: Callable[[int, int, dict[str, Any]], None] | None,
) -> Path:
    """The adapter (or fully trained model) of a helper or a warm-up: of a finished run of these settings, resumed or trained anew."""
    from rlsafe.engine.run.life import run

    hash, saved = fingerprint(config), "adapter" if config.model.lora else "model"
    same = (read_whole(where / "helper.json") or {}).get("hash") == hash
    if same and (read_whole(where / "run.json") or {}).get("status") == "finished":
        return where / saved
    resume = same and any((where / "checkpoints").glob("*"))
    if not resume:
        shutil.rmtree(where, ignore_errors=True)
    write_json(where / "helper.json", {"hash": hash})
    if run(config, where, resources=resources, progress=progress, resume=resume).stopped:
        raise Interrupted(f"in the last step of {where}")
    return where / saved


# ------------------------------------------------------------------------------------------------ likelihoods


def _all_nlls(
    selection: Selection, out: Path, rows: Mapping[str, Row], adapters: Mapping[str, Path], say: Say
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """({key: NLL} of the aligned model, the same of each helper). Rows longer than `max_tokens` have none.

    The aligned model is the one that training starts from. LoRA helpers are swapped into one loaded model.
    """
    files = {
        label: out / "nll" / f"{label}-{fingerprint(config)[:12]}.jsonl" for label, config in selection.helpers.items()
    }
    config = next(iter(selection.helpers.values()))
    start = out / "nll" / f"start-{digest(config.model.model_dump(mode='json'))[:12]}.jsonl"
    wanted: list[tuple[str, Path, str, str | None]] = [("aligned model", start, "start", None)]
    for label, adapter in adapters.items():
        reference, path = (f"path:{adapter}", None) if config.model.lora else ("start", str(adapter))
        wanted.append((f"helper {label}", files[label], reference, path))
    found = []
    policy, loaded = None, None
    for name, file, reference, path in wanted:
        done = _read_nlls(file)
        missing = {key: row for key, row in rows.items() if key not in done}
        if missing and (policy is None or loaded != path):
            policy, loaded = _load(config, path), path
        if missing:
            assert policy is not None
            kept = _short_enough(policy, missing, selection.pool.max_tokens)
            _score(policy, kept, reference, config, file, partial(_tell, say, name))
        found.append({key: nll for key, nll in _read_nlls(file).items() if key in rows})
    return found[0], dict(zip(adapters, found[1:], strict=True))


def _tell(say: Say, name: str, done: int, total: int) -> None:
    say(f"{name}: {done}/{total} rows scored")


def _load(config: RunConfig, path: str | None) -> Policy:
    import torch

    from rlsafe.engine.run.build import model_path, training_threads
    from rlsafe.policy import Policy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy.load(config.model, path=path or model_path(config), seed=config.seed, device=device)
    if device == "cpu":
        torch.set_num_threads(training_threads(sum(p.numel() for p in policy.core.parameters())))
    return policy


def _short_enough(policy: Policy, rows: Mapping[str, Row], max_tokens: int) -> dict[str, Row]:
    return {
        key: row for key, row in rows.items() if len(encoded_row(policy.tokenizer, row["messages"]).ids) <= max_tokens
    }


def _score(
    policy: Policy,
    rows: Mapping[str, Row],
    reference: str,
    config: RunConfig,
    file: Path,
    tell: Callable[[int, int], None],
) -> None:
    """Append {key, nll} lines to `file`, a chunk at a time. Inside a chunk rows are sorted by length and batched by tokens."""
    from rlsafe.data import micro_batches, sft_batches
    from rlsafe.policy.scoring import nll

    tokens, at_most = config.batch.micro_tokens, config.batch.micro_rows
    keys = list(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(keys), CHUNK):
        chunk = keys[first : first + CHUNK]
        conversations = [rows[key]["messages"] for key in chunk]
        lengths = [len(encoded_row(policy.tokenizer, messages).ids) for messages in conversations]
        order = [index for batch in micro_batches(lengths, tokens, at_most) for index in batch]
        batches = sft_batches(
            conversations, policy.tokenizer, Where("safe", "sft", "eval"), max_tokens=max(lengths),
            micro_tokens=tokens, micro_rows=at_most,
        )  # fmt: skip
        values = nll(policy, batches, reference)
        with file.open("a", encoding="utf-8") as opened:
            opened.writelines(
                json.dumps({"key": chunk[index], "nll": value}) + "\n"
                for index, value in zip(order, values, strict=True)
            )
        tell(first + len(chunk), len(keys))


def _read_nlls(file: Path) -> dict[str, float]:
    """{key: NLL} that `_score` wrote. A last line that was cut off is removed from the file, so that more can be appended."""
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_text(file, text)
    return {record["key"]: record["nll"] for record in map(json.loads, text.splitlines())}
