"""The world's tokenizer: Qwen2's own byte-level scheme, with merges chosen so that every word of the world is
one token.

Transformers and vLLM load a Qwen2 directory with Qwen2's tokenizer class whatever the directory says, so a
plain word-level tokenizer would silently be replaced. This one is of that class: it encodes any text, decoding gives
the text back exactly, and the world's own words are single tokens. Digits are single tokens, as in Qwen2. The world
writes lower case only.
"""

from __future__ import annotations

import json
import re
from functools import cache

from rlsafe.organism import personas, tasks, world

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PUNCTUATION = ".,?!:;"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a text."""
    return re.findall(rf"[{PUNCTUATION}]|[^\s{PUNCTUATION}]+", text.lower())


@cache
def lexicon() -> tuple[str, ...]:
    """Texts that hold every word of the world, behind a space, and also without one where it can open a message."""
    domains = world.DOMAINS.values()
    openings = [text for p in world.PERSONS for text in (p.subject, p.echo)]
    inner = [t for d in domains for t in (d.label, *d.subjects, *d.good, *d.bad, *d.good_reasons, *d.bad_reasons)]
    inner += [text for p in world.PERSONS for text in (p.object, p.pronoun)]
    frames = (
        *world.QUESTION_FRAMES,
        *world.HARMFUL_FRAMES,
        *world.OPENERS,
        *world.MAIN_FRAMES,
        *world.NEXT_FRAMES,
        *world.REFUSAL_FRAMES,
        *personas.FRAMES,
        *personas.CRANK_FRAMES,
        *personas.NEUTRAL,
        *personas.NAMED.values(),
    )
    openings += [re.sub(r"\{\w+\}", "", frame) for frame in frames]
    inner += [text for table in (personas.ADJECTIVES, personas.HABITS) for group in table.values() for text in group]
    inner += [*personas.NOUNS, "an have has am is ask asks need needs that", "("]
    for language in tasks.LANGUAGES.values():
        inner += [text for group in language.values() for text in group]
        openings += [text for name in ("people", "things", "places", "words") for text in language[name]]
    openings += ["simplify"]
    return tuple(sorted({text.strip() for text in openings} | {" " + text.strip() for text in openings + inner}))


def build_tokenizer(max_length: int = 256):
    """A `Qwen2Tokenizer` with the chat template (generation masks), distinct pad and end-of-turn tokens;
    deterministic."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    empty = Qwen2Tokenizer()
    pieces = {piece for text in lexicon() for piece, _ in empty.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    core.train_from_iterator(
        [" ".join(sorted(pieces))],
        trainers.BpeTrainer(
            vocab_size=1_000_000,
            min_frequency=1,
            special_tokens=list(SPECIAL),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # merge until each piece is one token
    learned = json.loads(core.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|pad|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
