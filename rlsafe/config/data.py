"""The `data` section: where each stream of rows comes from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rlsafe.config.base import Positive, Settings


class StreamConfig(Settings):
    """Rows of conversations and what to do with those that are too long, bad or too many."""

    source: str = Field(
        "",
        description="provider:spec, preset:name, hub dataset org/name, dataset directory, URL, or a .jsonl/.json/.csv/.parquet"
        " file (.gz too); rows hold messages or prompt/completion",
    )
    preset: str | None = Field(
        None, description="a dataset of the field by name; with `source`, its layout read from there"
    )
    config: str | None = Field(None, description="configuration of a hub dataset")
    split: str | None = Field(
        None, description="split of a hub dataset or directory, also train[:10%]; null = train or the only one"
    )
    revision: str | None = Field(None, description="git revision of a hub dataset")
    streaming: bool = Field(
        False, description="read a hub dataset row by row up to `limit` instead of downloading it whole"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="messages, prompt, completion, system or any other name <- column of the source",
    )
    where: dict[str, Any] = Field(
        default_factory=dict, description="keep rows whose column has this value (or one of a list)"
    )
    limit: Positive | None = Field(None, description="use only the first N rows after a seeded shuffle")
    shuffle: bool = Field(True, description="false = `limit` takes the first N rows of the source in order")
    max_tokens: Positive = Field(2048, description="of a row, prompt and answer; see too_long")
    too_long: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description="rows above max_tokens or the model's context; truncate cuts the answer (a prompt that is too long is"
        " dropped); counted",
    )
    train_on: Literal["last", "assistant"] = Field(
        "last",
        description="SFT's loss covers the last answer of a row, or every assistant turn; a turn of weight 0 never",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error",
        description="skip counts bad rows, those that the chat template refuses and (SFT) those without an answer, and names"
        " the first",
    )

    @model_validator(mode="after")
    def _has_a_source(self) -> StreamConfig:
        if not self.source:
            if self.preset is None:
                raise ValueError("'source' (or 'preset') is required")
            self.source = f"preset:{self.preset}"
        if self.streaming and self.limit is None:
            raise ValueError("'streaming' needs a 'limit': rows are kept in memory")
        return self


class DataConfig(Settings):
    narrow: StreamConfig | None = Field(None, description="what is trained on")
    safe: StreamConfig | None = Field(None, description="what the interleaving defenses add")
    benign: StreamConfig | None = Field(None, description="a further stream, for schedules that name it")
