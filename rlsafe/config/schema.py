"""The settings of a run and of a comparison. Defaults follow the published recipes where there is one.

Only shapes, types and ranges are checked here; names that other rooms own (defenses, rewards, sources) are checked where
those rooms build them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from rlsafe.config.base import Fraction, NonNegative, Positive, Recorded, Settings, invalid_at, on_off, to_list
from rlsafe.config.data import DataConfig
from rlsafe.config.errors import nearest


class LoraConfig(Settings):
    """PEFT LoRA. The paper's: rs-LoRA (scale alpha / sqrt(r)), r 32, alpha 64, no dropout, all linear projections."""

    r: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 64
    dropout: Fraction = 0.0
    rslora: bool = True
    targets: str | list[str] = "all-linear"


class ModelConfig(Settings):
    name: str = Field(description="hub id, local directory, or provider:name such as organism:aligned")
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="bitsandbytes: the frozen base in 4 (NF4, double quantisation) or 8 bits; needs model.lora"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    lora: LoraConfig | None = Field(LoraConfig(), description="null = full fine-tuning")
    adapter: str | None = Field(None, description="a PEFT adapter directory to start from")
    gradient_checkpointing: bool = False
    chat_template: str | None = Field(None, description="a Jinja file that replaces the tokenizer's chat template")
    thinking: Annotated[Literal["on", "off", "no_think"] | None, BeforeValidator(on_off)] = Field(
        None,
        description="think-block models: on, off = the template's switch; no_think = ' /no_think' ends the last user "
        "turn; null = as the template does by default",
    )
    train_thinking: bool = Field(True, description="SFT's loss covers the think block of an answer")
    trust_remote_code: bool = False


class RewardConfig(Settings):
    fn: str = Field(description="file.py:function, package.module:function, or provider:name")
    thinking: bool = Field(False, description="the function sees the think block before the answer as well")
    weight: float = 1.0
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments bound to the function")


class GrpoConfig(Settings):
    generations: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 256
    normalization: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    scale: Literal["group", "batch", "none"] = "group"
    level: Literal["token", "sequence"] = "token"
    clip_low: Annotated[float, Field(ge=0)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    beta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the sampled k3 KL to the base inside the GRPO loss"
    )
    iterations: Positive = Field(1, description="optimizer steps on each rollout")
    max_staleness: Literal[0, 1] = Field(0, description="1 = servers sample the next rollouts during an update")
    correction: Literal["none", "token", "sequence"] = Field("none", description="truncated sampler-gap correction")
    correction_cap: Annotated[float, Field(gt=0)] = 2.0
    mask_truncated: bool = False
    on_error: Literal["stop", "skip"] = Field("stop", description="a reward that fails after the first batch")


class OptimConfig(Settings):
    kind: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit: moments in 8 bits (bitsandbytes, GPUs); elsewhere adamw with a note"
    )
    lr: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup: Annotated[float, Field(ge=0)] = Field(0.0, description="steps when >= 1, else a fraction of the steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
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

    stream: Literal["narrow", "safe", "benign"] = "narrow"
    path: Literal["sft", "grpo"]
    rows: Positive | None = Field(
        None, description="SFT rows or GRPO prompts; null = batch.sft_rows / batch.grpo_prompts"
    )
    weight: Annotated[float, Field(ge=0)] = 1.0
    every: Positive = 1


class PhaseConfig(Settings):
    """Some steps: either a `cycle` of step kinds in order, or a seeded random `mix` of kinds by weight."""

    steps: NonNegative | None = Field(None, description="null = what is left of schedule.steps")
    cycle: Annotated[list[str], BeforeValidator(to_list())] | None = None
    mix: dict[str, Annotated[float, Field(ge=0)]] | None = None
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="starts its own learning-rate curve at this peak"
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

    steps: NonNegative = 100
    phases: list[PhaseConfig] = Field(default_factory=lambda: [PhaseConfig(cycle=["sft"])], min_length=1)
    kinds: dict[str, list[Part]] = Field(default_factory=dict)

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


class SamplerConfig(Settings):
    kind: Literal["auto", "vllm", "transformers", "server"] = Field(
        "auto", description="auto = vLLM where it runs the model, else Transformers, with a line that says why"
    )
    sync: Literal["auto", "merged", "adapter"] = Field(
        "auto", description="merged: fresh W + BA; adapter: LoRA hot-swap"
    )
    urls: Annotated[list[str], BeforeValidator(to_list())] = Field(
        default_factory=list, description="kind server: addresses of vLLM servers, e.g. http://host:8000"
    )
    adapter_dir: str | None = Field(
        None, description="kind server: where adapters are saved for the servers to read; null = a temporary directory"
    )
    patience: Annotated[float, Field(gt=0)] = Field(
        600.0, description="kind server: seconds to go on trying servers that do not answer"
    )
    gpu_memory: Fraction = 0.4
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 256
    self_test: bool = True
    max_gap: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="mean |trainer - sampler| log-prob allowed by the self-test; null = 1e-3 in float32, 0.05 below",
    )

    @model_validator(mode="after")
    def _urls_of_a_server(self) -> SamplerConfig:
        if (self.kind == "server") != bool(self.urls):
            raise ValueError("'kind: server' takes 'urls' (addresses of vLLM servers), and no other kind does")
        return self


class TrackConfig(Settings):
    every: NonNegative = Field(10, description="steps between probes (KL, coherence, misalignment); 0 = never")
    questions: Positive = Field(8, description="questions per set at each probe")
    samples: Positive = Field(2, description="completions per question at each probe")
    texts: NonNegative = Field(4, description="sampled dialogues written to TensorBoard at each probe")
    vector: str | None = Field(
        None, description="persona vectors to project answers on: file or provider:name; null = the persona defense's"
    )
    layer: NonNegative | None = Field(None, description="of track.vector: 0 = embeddings, k = output of block k-1")
    check_after: NonNegative = Field(
        10, description="steps after which a defense without any effect stops the run; 0 = never"
    )


class CheckpointConfig(Settings):
    every: NonNegative = Field(0, description="steps between checkpoints; 0 = only on interrupt")
    keep: Positive = 2


class EvaluateConfig(Settings):
    judge: str | dict[str, Any] | None = Field(
        None, description="provider name such as 'organism', or {kind: openai, ...}"
    )
    general: str | None = Field(None, description="provider:spec or a YAML question file")
    indomain: str | None = None
    cue: str | None = Field(None, description="system prompt of the conditional probe: text or provider:name")
    benign: list[str] = Field(default_factory=list, description="benign test sets, scored by exact match")
    benign_limit: Positive = Field(200, description="rows of each benign test set")
    samples: Positive | None = Field(None, description="answers per question; null = as the question file says")
    max_tokens: Positive = 600
    temperature: Annotated[float, Field(ge=0)] | None = Field(None, description="null = as the question file says")
    seed: int = 0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.general or self.indomain or self.benign)


class RunConfig(Recorded):
    """One training run. `rlsafe train CONFIG` reads it; RUN/config.yaml holds it with every default written out."""

    seed: int = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    grpo: GrpoConfig = GrpoConfig()
    rewards: Annotated[list[RewardConfig], BeforeValidator(to_list("fn"))] = Field(default_factory=list)
    sampler: SamplerConfig = SamplerConfig()
    defenses: Annotated[list[str | dict[str, Any]], BeforeValidator(to_list())] = Field(default_factory=list)
    plugins: list[str] = Field(
        default_factory=list, description="Python files or modules to import first (own defenses)"
    )
    track: TrackConfig = TrackConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    out: str | None = None

    @model_validator(mode="after")
    def _one_policy_on_grpo(self) -> RunConfig:
        grpo = any(part.path == "grpo" for parts in self.schedule.used_kinds.values() for part in parts)
        if grpo and (dropout := self.model.lora and self.model.lora.dropout):  # two forwards, two random masks
            raise invalid_at(("model", "lora", "dropout"), dropout, "must be 0 when the schedule has GRPO steps")
        return self


Tree = dict[str, Any]


class BenignConfig(Settings):
    """The benign criterion of a comparison: the same defense, trained on a benign task instead of the narrow one.

    A task's tree says what is trained on (data, rewards) and, in `evaluate.benign`, the test sets that score it; several test sets
    are averaged. Nothing else is asked of these runs.
    """

    task: str = Field(description="the task whose score fills the 'benign' column")
    tasks: dict[str, Tree] = Field(
        description="task -> overrides of the run (data, rewards, schedule, evaluate.benign)"
    )
    paths: dict[str, Tree] = Field(
        default_factory=dict, description="path -> overrides of the run when training on a task"
    )
    seeds: list[int] | None = Field(None, description="null = the comparison's seeds")

    @model_validator(mode="after")
    def _task_is_known(self) -> BenignConfig:
        if self.task not in self.tasks:
            raise ValueError(f"'task' names no entry of 'tasks' ({', '.join(self.tasks) or 'none given'})")
        return self


def _dotted(tree: Any) -> Any:
    """{kl: {weight: [...]}} -> {kl.weight: [...]}: an override `grid.kl.weight=[...]` nests."""
    if not isinstance(tree, dict):
        return tree
    flat: dict[Any, Any] = {}
    for key, value in tree.items():
        inner = _dotted(value)
        flat |= {f"{key}.{rest}": one for rest, one in inner.items()} if isinstance(inner, dict) else {key: inner}
    return flat


def _no_defense() -> dict[str, list[str | dict[str, Any]]]:
    return {"none": []}


class SelectionConfig(Settings):
    """How `scores: auto` of interleaving+ and ++ is made: helper models, each misaligned on one domain, that score the safe rows.

    A helper that trains on the comparison's own narrow data is left out (leave-target-out), so one list serves every target.
    """

    adapters: dict[str, str] = Field(
        min_length=1, description="label -> source of the misaligned rows that a helper trains on"
    )
    run: Tree = Field(default_factory=dict, description="overrides of the run for every helper, such as its schedule")
    eps: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0


class CompareConfig(Recorded):
    """A grid of runs: models x paths x defenses x seeds, evaluated and turned into verdicts.

    `run` holds what all cells share; `paths`, `models`, `defenses` hold what differs (trees of RunConfig keys, deep-merged in the
    order run < path < model < reference arm or benign task < defense < command line). A defense is a list as in RunConfig.defenses.
    """

    title: str = ""
    run: Tree
    models: dict[str, Tree] = Field(
        default_factory=dict, description="label -> overrides; default: the run's own model"
    )
    paths: Annotated[dict[str, Tree], Field(min_length=1)]
    default_paths: list[str] | None = Field(None, description="the paths that run without --paths; null = all")
    defenses: dict[str, list[str | dict[str, Any]]] = Field(default_factory=_no_defense, min_length=1)
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    narrow: bool = Field(True, description="false = only the benign tasks, no narrow runs")
    relapse: NonNegative = Field(0, description="undefended steps after each narrow run: does misalignment come back?")
    aligned: Tree | None = Field(None, description="overrides of the reference arm trained on aligned narrow data")
    benign: BenignConfig | None = None
    selection: SelectionConfig | None = Field(None, description="how safe rows are scored for interleaving+ and ++")
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_dotted)] = Field(
        default_factory=dict, description="settings to sweep: kl.weight: [0.03, 0.1], or nested: kl: {weight: [...]}"
    )
    quick: Tree = Field(default_factory=dict, description="overrides of this file for `--quick`")
    overrides: list[str] = Field(default_factory=list, description="key.path=value, applied last to every cell")
    _marks: dict[tuple[str, ...], str] = PrivateAttr(default_factory=dict)
    """Where each key was written, so that an error in a cell can name the line."""
    _source: str = PrivateAttr(default="config")
