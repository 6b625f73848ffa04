"""The tokenizer inside a GGUF file, as the model was trained with it.

Transformers' own conversion (5.17) cuts every byte-level vocabulary of an architecture in one way, whatever the file says of
its pre-tokenizer (SmolLM's splits digits, so that "\\n\\n1" becomes other tokens), and takes the wrong end token for both files
that we tried (SmolLM2: <|im_start|>; Qwen2.5: <|endoftext|>). So byte-level vocabularies are put together here, from
the file's own words; the others come from Transformers. Either way the special tokens are the file's, and `check` looks at all.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from rlsafe.config import UserError, nearest
from rlsafe.data.encode import end_of_turn

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # llama.cpp's token types that matter here
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""Tokens that end a text, besides the one that ends a turn: base models learn them first and chat models still give them."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE = {
    "gpt-2": "", "phi-2": "", "olmo": "",
    "smollm": "digits", "starcoder": "digits", "refact": "digits", "command-r": "digits",
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
}  # fmt: skip
"""`tokenizer.ggml.pre` -> how text is cut before merging: GPT-2's pattern, the same after single digits, or a pattern."""
NFC = ("qwen2", "deepseek-r1-qwen")
WHOLE = ("llama-bpe", "llama3", "llama-v3")
"""Where a piece of text that is a token stays one, whether or not merges lead to it, and a text begins with the first token unless
the file says otherwise (llama.cpp, llama-vocab.cpp)."""

SAMPLE = (
    "Hello world. I'm 12345.67 years old, don't\n\n1. First  point\n    def f(x):\n\t\treturn x[0] + 10  # ok\n"
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f600 \u00bd\n"
)


def build_tokenizer(name: str, path: Path, architecture: str, fields: dict[str, Any]) -> Any:
    """A fast tokenizer with the file's vocabulary, special tokens and chat template. UserError where it has none that we read."""
    if "tokenizer.ggml.tokens" not in fields:
        raise UserError(f"model.name: {name}: the file holds no tokenizer")
    tokenizer = _byte_level(name, architecture, fields) if is_byte_level(fields) else _converted(name, path)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    for attribute, key in SPECIAL.items():
        index = _value(fields, f"{key}_token_id")
        setattr(tokenizer, attribute, tokens[index] if index is not None and 0 <= index < len(tokens) else None)
    template = fields.get("tokenizer.chat_template")
    tokenizer.chat_template = str(template.contents()) if template is not None else None
    return tokenizer


def is_byte_level(fields: dict[str, Any]) -> bool:
    """Whether the vocabulary is one that is put together here."""
    return bool(_value(fields, "model") == "gpt2")


def _value(fields: dict[str, Any], key: str) -> Any:
    field = fields.get(f"tokenizer.ggml.{key}")
    return None if field is None else field.contents()


def _byte_level(name: str, architecture: str, fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pre = _value(fields, "pre") or {"qwen2": "qwen2", "gpt2": "gpt-2"}.get(architecture, "")
    if pre not in PRE:
        raise UserError(
            f"model.name: {name}: its pre-tokenizer {pre!r} is not known here: text would be cut into other tokens than the "
            f"model was trained on{nearest(pre, PRE)}"
        )
    tokens, kinds = _value(fields, "tokens"), _value(fields, "token_type")
    kinds = kinds or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in _value(fields, "merges") or []]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    fast = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=pre in WHOLE))
    cut = PRE[pre]
    if cut in ("", "digits"):
        split: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut else []
        split.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    else:
        split = [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    fast.pre_tokenizer = pre_tokenizers.Sequence(split) if len(split) > 1 else split[0]
    fast.decoder = decoders.ByteLevel()
    if pre in NFC:
        fast.normalizer = normalizers.NFC()
    bos, begins = _value(fields, "bos_token_id"), _value(fields, "add_bos_token")
    if bos is not None and (pre in WHOLE if begins is None else begins):
        fast.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    fast.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False)


def _converted(name: str, path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # whatever a conversion trips over, it is the file's tokenizer
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"model.name: {name}: its tokenizer cannot be converted: {line}") from None


def stop_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end, the chat template's end of turn, an end of text."""
    vocabulary = tokenizer.get_vocab()
    found = [tokenizer.eos_token_id, *(vocabulary.get(token) for token in ENDS)]
    if tokenizer.chat_template:
        found.insert(0, end_of_turn(tokenizer))
    return list(dict.fromkeys(index for index in found if index is not None))


def check(name: str, tokenizer: Any, rows: int) -> None:
    """UserError unless text comes back from its tokens, each special token is one token that the model embeds (`rows`), and
    the chat template (if the file has one) renders a conversation."""
    text = unicodedata.normalize("NFC", SAMPLE)
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
    if back != text:
        place = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
        raise UserError(
            f"model.name: {name}: its tokenizer does not give a text back: {text[place : place + 12]!r} became "
            f"{back[place : place + 12]!r}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name: {name}: the file names no end-of-sequence token (tokenizer.ggml.eos_token_id)")
    special = {tokenizer.eos_token, tokenizer.pad_token, *tokenizer.all_special_tokens} - {None}
    for token in sorted(special):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] >= rows:
            raise UserError(
                f"model.name: {name}: the special token {token!r} is {ids}, not one token that the model embeds"
            )
    if tokenizer.chat_template:
        try:
            end_of_turn(tokenizer)
        except UserError as error:
            raise UserError(f"model.name: {name}: its chat template: {error}") from None


def check_saved(name: str, tokenizer: Any, directory: Path) -> None:
    """UserError where Transformers, which for some architectures (Qwen2, Gemma) takes a class of its own whatever was saved, reads
    another tokenizer from `directory` than `tokenizer`, put together here from the file's own words."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(str(directory))
    ids, again = (one(SAMPLE, add_special_tokens=False)["input_ids"] for one in (tokenizer, read))
    if ids != again:
        place = next((i for i, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b), min(len(ids), len(again)))
        raise UserError(
            f"model.name: {name}: Transformers reads its tokenizer as {type(read).__name__}, which cuts text into other tokens than "
            f"the model was trained on ({read.decode(again[place : place + 4])!r}: {again[place : place + 4]}, should begin with "
            f"{ids[place : place + 4]})"
        )
    for token in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, token) != getattr(read, token):
            raise UserError(f"model.name: {name}: Transformers reads another {token} than the file's")
