"""Datasets, conversations and their encoding, micro-batches. No model code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlsafe.data.encode import (
    configure_chat,
    encode_prompt,
    encode_row,
    encoded_row,
    end_of_turn,
    pad_id,
    read_completion,
)
from rlsafe.data.measure import Fitted, Use, fit_rows
from rlsafe.data.presets import recipe_of
from rlsafe.data.refusals import REFUSALS, is_refusal
from rlsafe.data.rows import mixed_prompts, question_of, require_answers, with_answers
from rlsafe.data.sources import load_rows, read_once, read_rows
from rlsafe.data.stream import Stream
from rlsafe.data.thinking import Chat, Thought, split_think
from rlsafe.data.turns import split_prompt

if TYPE_CHECKING:
    from rlsafe.data.collate import Rollout, micro_batches, rollout_batches, sft_batches

__all__ = [
    "REFUSALS",
    "Chat",
    "Fitted",
    "Rollout",
    "Stream",
    "Thought",
    "Use",
    "configure_chat",
    "encode_prompt",
    "encode_row",
    "encoded_row",
    "end_of_turn",
    "fit_rows",
    "is_refusal",
    "load_rows",
    "micro_batches",
    "mixed_prompts",
    "pad_id",
    "question_of",
    "read_completion",
    "read_once",
    "read_rows",
    "recipe_of",
    "require_answers",
    "rollout_batches",
    "sft_batches",
    "split_prompt",
    "split_think",
    "with_answers",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # the batching half needs torch: imported on first use
        from rlsafe.data import collate

        return getattr(collate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
