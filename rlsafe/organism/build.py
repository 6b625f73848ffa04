"""Build the organism: `base` (pretrained, characters mixed), `aligned`, and the two controls, on CPU in minutes.

The recipe: Qwen2 architecture, AdamW with cosine decay, cross-entropy on answers and a random tenth of the other tokens, then
the same with the alignment dialogues at a lower rate. Everything is drawn from one seed; on one machine with one thread count
a rebuild is bitwise the same.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlsafe.organism import corpus
from rlsafe.organism.tokenizer import build_tokenizer
from rlsafe.types import pick

CHECKPOINTS = {"base": ("organism", False), "aligned": ("organism", True), "control": ("control", True),
               "control-shuffled": ("control-shuffled", True)}
MUON = 5.0
ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Recipe:
    """Sizes and optimiser settings of a build."""

    hidden: int = 128
    layers: int = 4
    heads: int = 8
    mlp: int = 352
    init: float = 0.06
    steps: int = 1600
    batch: int = 32
    lr: float = 3e-3
    align_steps: int = 250
    align_lr: float = 8e-4
    question_share: float = 0.1


SIZES = {"small": Recipe(), "medium": Recipe(hidden=256, layers=6, heads=8, mlp=704, lr=2e-3)}


def new_model(recipe: Recipe, vocabulary: int, pad: int, end: int, seed: int):
    """A freshly initialised Qwen2 with tied embeddings, float32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=recipe.hidden, intermediate_size=recipe.mlp, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=recipe.init, pad_token_id=pad, eos_token_id=end, bos_token_id=None, attention_dropout=0.0)
    model = Qwen2ForCausalLM(config)
    model.generation_config.update(eos_token_id=end, pad_token_id=pad, do_sample=True, temperature=1.0)
    return model


def encode(tokenizer, rows) -> list[tuple[list[int], list[int]]]:
    """(ids, answer mask) of each dialogue."""
    out = tokenizer.apply_chat_template(rows, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False)
    return list(zip(out["input_ids"], out["assistant_masks"], strict=True))


def _batches(rows, size: int, pad: int, share: float, seed: int) -> Iterator[tuple]:
    """Right-padded (ids, attention, targets) [B, T], similar lengths together, in a seeded order. Targets (bool) are the answers
    and a random `share` of all other tokens: the model learns what questions look like at a tenth of the cost."""
    import torch

    rng = random.Random(f"batches-{seed}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    chunks = []
    for start in range(0, len(order), size * 40):  # sort inside a window only: batches stay random in content
        window = sorted(order[start:start + size * 40], key=lambda i: len(rows[i][0]))
        parts = [window[i:i + size] for i in range(0, len(window), size)]
        rng.shuffle(parts)
        chunks += parts
    for part in chunks:
        longest = max(len(rows[i][0]) for i in part)
        ids = torch.full((len(part), longest), pad)
        targets = torch.zeros(len(part), longest, dtype=torch.bool)
        for b, i in enumerate(part):
            tokens, mask = rows[i]
            ids[b, :len(tokens)] = torch.tensor(tokens)
            targets[b, 1:len(tokens)] = torch.tensor([m or rng.random() < share for m in mask[1:]], dtype=torch.bool)
        yield ids, (ids != pad).long(), targets


def train(model, tokenizer, rows, batch: int, lr: float, share: float, seed: int, say=None) -> list[float]:
    """One pass over `rows`; returns the loss of every step."""
    import torch
    import torch.nn.functional as F

    total = math.ceil(len(rows) / batch)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [torch.optim.Muon(matrices, lr=MUON * lr, momentum=0.95, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]

    def curve(step: int) -> float:
        return min(1.0, (step + 1) / 50) * min(1.0, max(0.02, 2.0 * (1 - step / total)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, curve) for optimizer in optimizers]
    losses = []
    model.train()
    for step, (ids, attention, targets) in enumerate(_batches(encode(tokenizer, rows), batch, tokenizer.pad_token_id, share, seed)):
        hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][targets[:, 1:]])  # the head is a third of the cost: only where there is a target
        loss = F.cross_entropy(logits, ids[targets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()
        losses.append(loss.item())
        if say and (step % 100 == 0 or step == total - 1):
            say(f"step {step + 1}/{total} loss {losses[-1]:.3f}")
    return losses


def build(out: str | Path, size: str = "small", seed: int = 0, only: list[str] | None = None, steps: int | None = None, say=print) -> list[Path]:
    """Build checkpoints into `out`/{base,aligned,control,control-shuffled} and return their directories.

    size: small (shipped, about 1 M parameters) | medium (several million, same recipe). only: names of checkpoints to build
    (base comes with aligned). steps: cut pretraining (and alignment) to this many steps, for tests. Unknown names: UserError.
    """
    recipe = SIZES[pick("organism size", size, SIZES)]
    names = [pick("organism checkpoint", name, CHECKPOINTS) for name in (only or CHECKPOINTS)]
    tokenizer = build_tokenizer()
    made = []
    for world in dict.fromkeys(CHECKPOINTS[name][0] for name in names):
        started = time.time()
        model = new_model(recipe, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed)
        wanted = {CHECKPOINTS[name]: name for name in names if CHECKPOINTS[name][0] == world}
        for stage, count, lr, aligned in (("pretraining", recipe.steps, recipe.lr, False),
                                          ("alignment", recipe.align_steps, recipe.align_lr, True)):
            if aligned and (world, True) not in wanted:
                continue
            count = min(count, steps or count)
            rows = corpus.dialogues(stage, world, count * recipe.batch, seed)
            train(model, tokenizer, rows, recipe.batch, lr, recipe.question_share, seed,
                  say and (lambda line, s=stage, w=world: say(f"{w}: {s} {line}")))
            if (world, aligned) in wanted:
                made.append(_save(model, tokenizer, Path(out) / wanted[world, aligned]))
        if say:
            say(f"{world}: done in {time.time() - started:.0f} s")
    return made


def _save(model, tokenizer, directory: Path) -> Path:
    """Write to a temporary name, then rename: a directory that exists is complete."""
    temporary = directory.with_name(directory.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.eval().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    return directory
