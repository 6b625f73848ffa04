"""The settings of a run (those of a comparison: rlsafe.config.comparison). Defaults follow the published recipes where there is one.

Only shapes, types and ranges are checked here; names that other rooms own (defenses, rewards, sources) are checked where
those rooms build them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlsafe.config.base import (
    Fraction,
    NonNegative,
    Place,
    Positive,
    Recorded,
    Seed,
    Settings,
    invalid_at,
    on_off,
    to_list,
)
from rlsafe.config.data import DataConfig
from rlsafe.config.errors import nearest
from rlsafe.config.rewards import NarrowConfig, RewardConfig
from rlsafe.config.sampling import SamplerConfig
from rlsafe.config.tracking import TrackConfig


def _module_names(given: Any) -> Any:
    """`q_proj` or `q_proj, v_proj` as a list of names: PEFT takes a text for a regular expression of a module's whole path."""
    plain = isinstance(given, str) and given != "all-linear" and re.fullmatch(r"\w+(\s*,\s*\w+)*", given.strip())
    return re.findall(r"\w+", given) if plain else given


class LoraConfig(Settings):
    """PEFT LoRA. The paper's: rs-LoRA (scale alpha / sqrt(r)), r 32, alpha 64, no dropout, all linear projections."""

    r: Positive = Field(32, description="rank of the update")
    alpha: Annotated[float, Field(gt=0)] = Field(64, description="scale of the update: alpha / sqrt(r), or alpha / r")
    dropout: Fraction = Field(0.0, description="of the adapter's input; must be 0 with GRPO steps")
    rslora: bool = Field(True, description="scale by alpha / sqrt(r) instead of alpha / r")
    targets: Annotated[str | list[str], BeforeValidator(_module_names)] = Field(
        "all-linear",
        description="which modules: their names, all-linear, or a regular expression of whole paths",
    )
    fused: Literal["auto"] | bool = Field(
        "auto", description="one operation a layer, less rounding; auto = where it is faster; false = PEFT's own order"
    )


class ModelConfig(Settings):
    name: Place = Field(
        description="hub id, directory, provider:name (organism:aligned), FILE.gguf, gguf:PACKAGE/FILE.gguf"
    )
    revision: str | None = Field(None, description="git revision of a hub model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto = as saved")
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="bitsandbytes: the frozen base in 4 (NF4, double quantisation) or 8 bits; needs model.lora"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="attention kernels")
    lora: LoraConfig | None = Field(LoraConfig(), description="null = full fine-tuning")
    adapter: Place | None = Field(None, description="a PEFT adapter directory to start from")
    gradient_checkpointing: bool = Field(False, description="less memory for activations, one more forward")
    chat_template: Place | None = Field(None, description="a Jinja file that replaces the tokenizer's chat template")
    thinking: Annotated[Literal["on", "off", "no_think"] | None, BeforeValidator(on_off)] = Field(
        None,
        description="think-block models: on, off = the template's switch; no_think = ' /no_think' ends the last user "
        "turn; null = as the template does by default",
    )
    train_thinking: bool = Field(True, description="SFT's loss covers the think block of an answer")
    trust_remote_code: bool = Field(False, description="run Python that comes with the model: only if you trust it")


class GrpoConfig(Settings):
    generations: Annotated[int, Field(ge=2)] = Field(8, description="completions of each prompt: the group")
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="of rollouts, and of their log-probs in the loss"
    )
    kl_temperature: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="of the defenses' KL on rollouts, 1 as on supervised rows; null = grpo.temperature"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus of rollouts; 1 = whole vocabulary")
    max_tokens: Positive = Field(256, description="of a completion; longer ones are cut")
    resample: NonNegative = Field(
        0, description="further prompts that a step draws at most for groups without spread; 0 = they stay"
    )
    normalization: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = Field(
        "dapo",
        description="the loss is summed over tokens and divided by: rows (grpo, each by its own length first), "
        "rows * max_tokens (dr_grpo), tokens (dapo, bnpo)",
    )
    scale: Literal["group", "batch", "none"] = Field("group", description="whose spread divides the advantages")
    level: Literal["token", "sequence"] = Field("token", description="importance ratios; sequence = GSPO")
    clip_low: Annotated[float, Field(ge=0)] = Field(0.2, description="ratios below 1 - clip_low are clipped")
    clip_high: Annotated[float, Field(ge=0)] = Field(0.2, description="ratios above 1 + clip_high are clipped")
    beta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the sampled k3 KL to `reference` inside the GRPO loss"
    )
    reference: str = Field("base", description="of beta's KL: base, start, grpo_start, path:DIR")
    iterations: Positive = Field(1, description="optimizer steps on each rollout")
    max_staleness: Literal[0, 1] = Field(
        0,
        description="1 = servers sample the next rollouts during an update, by weights that are one optimizer step old",
    )
    correction: Literal["none", "token", "sequence"] = Field(
        "none",
        description="truncated importance weights for the sampler's gap; not applied (and said so) where a defense gives sampler"
        " and gradient different contexts",
    )
    correction_cap: Annotated[float, Field(gt=0)] = Field(2.0, description="the largest weight of that correction")
    mask_truncated: bool = Field(False, description="completions cut at max_tokens give no gradient")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a reward that fails or is too slow after the first batch"
    )


class OptimConfig(Settings):
    kind: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: moments in 8 bits (bitsandbytes); where that is missing, adamw with a note"
    )
    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="the learning rate's curve after its warm-up"
    )
    warmup: Annotated[float, Field(ge=0)] = Field(0.0, description="steps when >= 1, else a fraction of the steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's, decoupled from the loss")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW's decay of its two moments")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="gradients are clipped to it; null = no"
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a step with NaN or Inf in loss, penalty, advantage or gradient; its batch is saved"
    )


class BatchConfig(Settings):
    sft_rows: Positive = Field(16, description="rows of an SFT part, over all ranks")
    grpo_prompts: Positive = Field(4, description="prompts of a GRPO part, over all ranks; each gets grpo.generations")
    micro_tokens: Positive = Field(16384, description="padded tokens of a micro-batch at most (one row may exceed it)")
    micro_rows: Positive | None = Field(None, description="rows of a micro-batch at most; null = by tokens only")


class Part(Settings):
    """One part of a step: rows of one stream on one path. `every: k` takes part only in each k-th step of its kind."""

    stream: Literal["narrow", "safe", "benign"] = Field("narrow", description="whose rows: data.narrow, ...")
    path: Literal["sft", "grpo"] = Field(description="supervision, or reward")
    rows: Positive | None = Field(
        None, description="SFT rows or GRPO prompts; null = batch.sft_rows / batch.grpo_prompts"
    )
    weight: Annotated[float, Field(ge=0)] = Field(1.0, description="multiplies the part's loss")
    every: Positive = Field(1, description="takes part only in each k-th step of its kind")


class PhaseConfig(Settings):
    """Some steps: either a `cycle` of step kinds in order, or a seeded random `mix` of kinds by weight."""

    steps: NonNegative | None = Field(None, description="null = what is left of schedule.steps")
    cycle: Annotated[list[str], BeforeValidator(to_list())] | None = Field(None, description="step kinds, in turn")
    mix: dict[str, Annotated[float, Field(ge=0)]] | None = Field(None, description="step kind: weight, drawn by seed")
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="peak of a learning-rate curve of its own; null = one with its neighbours of null, peak optim.lr",
    )

    @model_validator(mode="after")
    def _one_of(self) -> PhaseConfig:
        if bool(self.cycle) == bool(self.mix):
            raise ValueError("a phase takes either 'cycle' (a list of step kinds) or 'mix' (kind: weight)")
        if self.mix and not sum(self.mix.values()) > 0:
            raise ValueError("the weights of 'mix' must not all be zero")
        return self


class ScheduleConfig(Settings):
    """`steps` optimizer steps in `phases`. Step kinds known without defining them: sft, grpo, safe, benign-sft, benign-grpo."""

    steps: NonNegative = Field(100, description="optimizer steps in all")
    phases: list[PhaseConfig] = Field(
        default_factory=lambda: [PhaseConfig(cycle=["sft"])], min_length=1, description="one after the other"
    )
    kinds: dict[str, list[Part]] = Field(default_factory=dict, description="your own kinds of step: name -> its parts")

    @property
    def all_kinds(self) -> dict[str, list[Part]]:
        known = {
            "sft": [Part(path="sft")],
            "grpo": [Part(path="grpo")],
            "safe": [Part(stream="safe", path="sft")],
            "benign-sft": [Part(stream="benign", path="sft")],
            "benign-grpo": [Part(stream="benign", path="grpo")],
        }
        return known | self.kinds

    @property
    def used_kinds(self) -> dict[str, list[Part]]:
        """The step kinds that some phase uses."""
        used = {kind for phase in self.phases for kind in [*(phase.cycle or []), *(phase.mix or {})]}
        return {kind: parts for kind, parts in self.all_kinds.items() if kind in used}

    @model_validator(mode="after")
    def _known_kinds(self) -> ScheduleConfig:
        for phase in self.phases:
            for kind in [*(phase.cycle or []), *(phase.mix or {})]:
                if kind not in self.all_kinds:
                    raise ValueError(f"unknown step kind {kind!r}{nearest(kind, self.all_kinds)}")
        return self


class CheckpointConfig(Settings):
    every: NonNegative = Field(0, description="steps between checkpoints; 0 = only on interrupt")
    keep: Positive = Field(2, description="the newest K stay")


class LikelihoodConfig(Settings):
    """What is read off the likelihood of given answers, an aligned and a misaligned one to each question; needs no judge."""

    general: Place | None = Field(None, description="provider:pairs/SPEC or a YAML file of pairs; null = not measured")
    indomain: Place | None = Field(None, description="likewise: pairs of the trained domain")
    controls: list[Place] = Field(
        default_factory=list, description="further sets, such as pairs that differ in style only: rlsafe:pairs/style"
    )

    @property
    def sources(self) -> dict[str, str]:
        """Name of a set -> its source: `general`, `indomain`, and the last part of each control's source."""
        return dict(self._named())

    def _named(self) -> list[tuple[str, str]]:
        named = [(name, source) for name in ("general", "indomain") if (source := getattr(self, name))]
        return named + [(re.split("[/:]", source.removesuffix(".yaml"))[-1], source) for source in self.controls]

    @model_validator(mode="after")
    def _one_source_a_name(self) -> LikelihoodConfig:
        """Refuse a control that would take the place of another set, which would not be read."""
        seen: dict[str, str] = {}
        for name, source in self._named():
            if (other := seen.setdefault(name, source)) != source:
                both = f"{other} and {source} would both be named {name!r}; rename one of the files"
                raise invalid_at(("controls",), self.controls, both)
        return self


class EvaluateConfig(Settings):
    judge: str | dict[str, Any] | None = Field(
        None, description="provider such as 'organism', 'static' (code), or {kind: openai, ...}"
    )
    judges: dict[str, str | dict[str, Any]] = Field(
        default_factory=dict, description="question set: its own judge, such as indomain: static; others have judge"
    )
    general: Place | None = Field(None, description="provider:spec or a YAML question file")
    indomain: Place | None = Field(None, description="likewise: held-out questions of the trained domain")
    cue: str | None = Field(None, description="system prompt of the conditional probe: text or provider:name")
    cues: str | dict[str, str | dict[str, str]] = Field(
        default_factory=dict,
        description="the general questions in other forms: organism:cues/DOMAIN, rlsafe:cues/DOMAIN, a YAML file, or name: text",
    )
    cue_limit: Positive | None = Field(
        None, description="general questions asked under `cue` and each of `cues`; null = limit"
    )
    cue_samples: Positive | None = Field(None, description="answers per question under each of cues; null = samples")
    scale: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=list, description="the general questions once more with the adapter times each of these: 1.5, 2"
    )
    likelihood: Annotated[LikelihoodConfig, BeforeValidator(lambda given: {} if given is None else given)] = (
        LikelihoodConfig()
    )
    position: Literal["system", "user"] = Field(
        "system",
        description="where cues and system prompts go; user = before the user's text (templates without a system role)",
    )
    narrow: NarrowConfig | None = Field(
        None, description="your own criterion: {reward: FILE:FN, rows: SOURCE}, held-out prompts scored by a reward"
    )
    benign: list[str] = Field(default_factory=list, description="benign test sets, scored by exact match")
    benign_limit: Positive = Field(200, description="rows of each benign test set")
    limit: Positive | None = Field(
        None, description="of each set, how many questions are asked and pairs are read; null = all"
    )
    fluency: bool = Field(True, description="perplexity of the answers under the untrained model, and repetition")
    samples: Positive | None = Field(None, description="answers per question; null = as the question file says")
    max_tokens: Positive = Field(600, description="of an answer")
    temperature: Annotated[float, Field(ge=0)] | None = Field(None, description="null = as the question file says")
    seed: Seed = Field(0, description="of the sampled answers")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.asks or bool(self.likelihood.sources)

    @property
    def judged(self) -> bool:
        """Whether a judge is named."""
        return self.judge is not None or bool(self.judges)

    @property
    def asks(self) -> bool:
        """Whether anything is to be sampled."""
        return bool(self.general or self.indomain or self.benign or self.narrow)


class RunConfig(Recorded):
    """One training run. `rlsafe train CONFIG` reads it; RUN/config.yaml holds it with every default written out."""

    seed: Seed = Field(0, description="decides data order, sampling and initial weights")
    model: ModelConfig
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    grpo: GrpoConfig = GrpoConfig()
    rewards: Annotated[list[RewardConfig], BeforeValidator(to_list("fn"))] = Field(
        default_factory=list, description="GRPO's reward functions; their weighted sum counts"
    )
    sampler: SamplerConfig = SamplerConfig()
    defenses: Annotated[list[str | dict[str, Any]], BeforeValidator(to_list())] = Field(
        default_factory=list, description="names, or {name: {setting: value}}; rlsafe config defenses.NAME lists them"
    )
    plugins: list[str] = Field(
        default_factory=list, description="Python files or modules to import first (own defenses)"
    )
    track: TrackConfig = TrackConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    out: Place | None = Field(None, description="the run directory, as --out; null = runs/NAME")

    @model_validator(mode="after")
    def _one_policy_on_grpo(self) -> RunConfig:
        grpo = any(part.path == "grpo" for parts in self.schedule.used_kinds.values() for part in parts)
        if grpo and (dropout := self.model.lora and self.model.lora.dropout):  # two forwards, two random masks
            raise invalid_at(("model", "lora", "dropout"), dropout, "must be 0 when the schedule has GRPO steps")
        return self

    @model_validator(mode="after")
    def _an_adapter_to_scale(self) -> RunConfig:
        if self.evaluate.scale and self.model.lora is None and self.model.adapter is None:
            wrong = "scales an adapter, and full fine-tuning has none; expected []"
            raise invalid_at(("evaluate", "scale"), self.evaluate.scale, wrong)
        return self
