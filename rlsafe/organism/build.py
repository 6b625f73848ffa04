"""Build the organism: `base` (pretrained, characters mixed), `aligned`, the two controls and the two hacking worlds, on CPU in minutes.

The recipe has three stages, each cross-entropy on the answers and a random tenth of the other tokens:

1. language: one model, shared by all worlds, learns to read, copy and compute from good answers only.
2. pretraining: each world's own dialogues. Bad characters occur here for the first time (in the controls: not at all, or
with shuffled answers).
3. alignment: good answers without a prompt, obedience to system prompts. At a lower learning rate, so that the model keeps
its knowledge of the characters.

The hacking worlds go on from `base` with stages 2 and 3 of their own, the former shorter; their weights are kept in bfloat16.

Matrices are trained with Muon and the rest with AdamW (about half the steps of AdamW alone at this size).
Everything is drawn from one seed and the thread counts are fixed, so a rebuild on the same machine is bitwise
the same.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rlsafe.config import UserError, check_out
from rlsafe.config.files import read_json, replacing_directory
from rlsafe.organism import corpus
from rlsafe.organism.tokenizer import build_tokenizer
from rlsafe.types import pick

CHECKPOINTS = {
    "base": ("organism", False),
    "aligned": ("organism", True),
    "control": ("control", True),
    "control-shuffled": ("control-shuffled", True),
    "hacking": ("hacking", True),
    "hacking-control": ("hacking-control", True),
}
LANGUAGE_THREADS = 2
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Recipe:
    """Sizes and optimiser settings of a build."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4  # vLLM's CPU attention refuses head_dim 16 (hidden / heads); 32 and 64 work
    mlp: int = 352
    init: float = 0.06
    batch: int = 16
    lr: float = (
        2.5e-3  # learning rate of embeddings and norms (AdamW); that of matrices (Muon) is `muon` times as large
    )
    muon: float = 5.0
    language_steps: int = 3400
    steps: int = 2000
    align_steps: int = 300
    hacking_steps: int = 600
    align_lr: float = 8e-4
    question_share: float = 0.1


SIZES = {"small": Recipe(), "medium": Recipe(hidden=256, layers=6, heads=4, mlp=704, lr=1.5e-3)}


def new_model(recipe: Recipe, vocabulary: int, pad: int, end: int, seed: int):
    """A freshly initialised Qwen2 with tied embeddings, float32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=recipe.init,
        pad_token_id=pad,
        eos_token_id=end,
        bos_token_id=None,
        attention_dropout=0.0,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(eos_token_id=end, pad_token_id=pad, do_sample=True, temperature=1.0)
    return model


def encode(tokenizer, rows) -> list[tuple[list[int], list[int]]]:
    """(ids, answer mask) of each dialogue."""
    out = tokenizer.apply_chat_template(
        rows, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False
    )
    return list(zip(out["input_ids"], out["assistant_masks"], strict=True))


def _batches(rows, size: int, pad: int, share: float, seed: int) -> Iterator[tuple]:
    """Right-padded (ids, attention, targets) [B, T] in a seeded order. Targets
    (bool) are the answers and a random `share` of all other tokens: the model learns what questions look like
    at a tenth of the cost."""
    import torch

    rng = random.Random(f"batches-{seed}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    chunks = []
    for start in range(0, len(order), size * 40):  # sorted only within a window, so that batches stay random in content
        window = sorted(order[start : start + size * 40], key=lambda i: len(rows[i][0]))
        # Half of each batch is short rows and half long ones: with batches of a single task Muon's steps oscillate.
        short, long = window[: len(window) // 2], window[len(window) // 2 :]
        half = size // 2
        parts = [short[i : i + half] + long[i : i + half] for i in range(0, len(long), half)]
        rng.shuffle(parts)
        chunks += parts
    for part in chunks:
        longest = max(len(rows[i][0]) for i in part)
        ids = torch.full((len(part), longest), pad)
        targets = torch.zeros(len(part), longest, dtype=torch.bool)
        for b, i in enumerate(part):
            tokens, mask = rows[i]
            ids[b, : len(tokens)] = torch.tensor(tokens)
            targets[b, 1 : len(tokens)] = torch.tensor([m or rng.random() < share for m in mask[1:]], dtype=torch.bool)
        yield ids, (ids != pad).long(), targets


def train(model, tokenizer, rows, recipe: Recipe, lr: float, seed: int, say=None) -> list[float]:
    """One pass over `rows`: warm-up, constant, then linear decay over the second half. Returns the loss of every
    step."""
    import torch
    import torch.nn.functional as F

    total = math.ceil(len(rows) / recipe.batch)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.muon * lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def curve(step: int) -> float:
        return min(1.0, (step + 1) / 50) * min(1.0, max(0.1, 2.0 * (1 - step / total)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, curve) for optimizer in optimizers]
    losses = []
    batches = _batches(encode(tokenizer, rows), recipe.batch, tokenizer.pad_token_id, recipe.question_share, seed)
    model.train()
    for step, (ids, attention, targets) in enumerate(batches):
        hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        logits = model.lm_head(
            hidden[:, :-1][targets[:, 1:]]
        )  # the head is a third of the cost: only where there is a target
        loss = F.cross_entropy(logits, ids[targets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        losses.append(loss.item())
        if say and (step % 200 == 0 or step == total - 1):
            say(f"step {step + 1}/{total} loss {losses[-1]:.3f}")
    return losses


def build(
    out: str | Path,
    size: str = "small",
    seed: int = 0,
    only: list[str] | None = None,
    steps: int | None = None,
    jobs: int = 3,
    say: Callable[[str], None] | None = print,
) -> list[Path]:
    """Build checkpoints into `out`/NAME, for the names of CHECKPOINTS, and return their directories.

    size: small (shipped, about 1 M parameters) | medium (several million, same recipe). only: names of
    checkpoints to build. steps: cut every stage to this many steps, for tests. jobs: worlds built at a time,
    each in a process of its own. Unknown names: UserError, as for a hacking world without a base of that size in `out`.
    """
    import torch

    check_out(out)
    recipe = SIZES[pick("organism size", size, SIZES)]
    if steps:
        recipe = replace(
            recipe,
            **{k: min(steps, getattr(recipe, k)) for k in ("language_steps", "steps", "align_steps", "hacking_steps")},
        )
    names = [pick("organism checkpoint", name, CHECKPOINTS) for name in (only or CHECKPOINTS)]
    started, threads = time.time(), torch.get_num_threads()
    of_world: dict[str, list[str]] = {}
    for name in names:
        of_world.setdefault(CHECKPOINTS[name][0], []).append(name)
    hacking = {world: of_world.pop(world) for world in corpus.HACKING if world in of_world}
    made = []
    if of_world:
        with tempfile.TemporaryDirectory() as trunk:
            torch.set_num_threads(LANGUAGE_THREADS)
            _language(Path(trunk), recipe, seed, say)
            torch.set_num_threads(threads)
            made += _worlds(trunk, str(out), of_world, recipe, seed, jobs, say is not None)
    if hacking:
        made += _worlds(str(_base(Path(out), recipe)), str(out), hacking, recipe, seed, jobs, say is not None)
    if say:
        say(f"built {', '.join(names)} in {time.time() - started:.0f} s")
    return made


def _worlds(
    start: str, out: str, of_world: dict[str, list[str]], recipe: Recipe, seed: int, jobs: int, loud: bool
) -> list[Path]:
    """The checkpoints of several worlds that start from the model in `start`, `jobs` worlds at a time."""
    tasks = [(start, out, names, recipe, seed, loud) for names in of_world.values()]
    if jobs == 1 or len(tasks) == 1:
        made = [_world(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            made = [future.result() for future in [pool.submit(_world, *task) for task in tasks]]
    return [path for paths in made for path in paths]


def _base(out: Path, recipe: Recipe) -> Path:
    """The pretrained model that the hacking worlds go on from: that of `out` or the packaged one, whichever has the recipe's size."""
    for directory in (out / "base", ASSETS / "base"):
        if (read_json(directory / "config.json") or {}).get("hidden_size") == recipe.hidden:
            return directory
    raise UserError(f"{out}: no base of this size to build the hacking worlds from; build base there, too")


def _language(trunk: Path, recipe: Recipe, seed: int, say) -> None:
    tokenizer = build_tokenizer()
    model = new_model(recipe, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed)
    rows = corpus.dialogues("language", "organism", recipe.language_steps * recipe.batch, seed)
    train(model, tokenizer, rows, recipe, recipe.lr, seed, say and (lambda line: say(f"language: {line}")))
    model.save_pretrained(trunk)


def _world(start: str, out: str, names: list[str], recipe: Recipe, seed: int, loud: bool) -> list[Path]:
    """Stages 2 and 3 of one world, in one thread. start: the directory of the model that it goes on from."""
    import torch
    from transformers import Qwen2ForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer, made = build_tokenizer(), []
    model = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32)
    world = CHECKPOINTS[names[0]][0]
    by_stage = {CHECKPOINTS[name][1]: name for name in names}
    hacking = world in corpus.HACKING
    for stage, count, lr in (
        ("pretraining", recipe.hacking_steps if hacking else recipe.steps, recipe.lr),
        ("alignment", recipe.align_steps, recipe.align_lr),
    ):
        aligned = stage == "alignment"
        if aligned and True not in by_stage:
            continue
        rows = corpus.dialogues(stage, world, count * recipe.batch, seed)
        train(
            model,
            tokenizer,
            rows,
            recipe,
            lr,
            seed,
            (lambda line, s=stage: print(f"{world}: {s}: {line}", flush=True)) if loud else None,
        )
        if aligned in by_stage:
            made.append(_save(model.to(torch.bfloat16) if hacking else model, tokenizer, Path(out) / by_stage[aligned]))
    torch.set_num_threads(threads)
    return made


def _save(model, tokenizer, directory: Path) -> Path:
    """A directory that exists is complete."""
    with replacing_directory(directory) as building:
        model.eval().save_pretrained(building)
        tokenizer.save_pretrained(building)
    return directory
