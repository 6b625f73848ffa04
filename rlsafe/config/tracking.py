"""What a run records while it trains, how often, and where it goes beside the run directory."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rlsafe.config.base import NonNegative, Positive, Settings, to_list


def _trackers(given: Any) -> Any:
    """A list of names; null and `none`, which Transformers' `report_to` takes, are no tracker at all."""
    return [] if given in (None, "none", ["none"]) else to_list()(given)


class TrackConfig(Settings):
    every: NonNegative = Field(10, description="steps between probes (KL, coherence, misalignment); 0 = never")
    questions: Positive = Field(8, description="questions per set at each probe")
    samples: Positive = Field(2, description="completions per question at each probe")
    pairs: Positive | None = Field(None, description="of evaluate.likelihood, of each set at each probe; null = all")
    texts: NonNegative = Field(4, description="sampled dialogues written to TensorBoard at each probe")
    vector: str | None = Field(
        None, description="persona vectors to project answers on: file or provider:name; null = the persona defense's"
    )
    layer: NonNegative | None = Field(None, description="of track.vector: 0 = embeddings, k = output of block k-1")
    to: Annotated[list[str], BeforeValidator(_trackers)] = Field(
        default_factory=lambda: ["tensorboard"],
        description="tensorboard, and any that Accelerate knows: wandb, mlflow, ...; none = no tracker",
    )
    project: str = Field("rlsafe", description="the project's name at trackers that have projects")
    init: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="tracker: further arguments of its start, such as wandb: {entity: NAME}"
    )
    check_after: NonNegative = Field(
        10,
        description="steps of each path, with rows that it acts on, after which a defense without any effect stops the run; 0 = never",
    )
