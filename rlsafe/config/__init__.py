"""Every setting, typed, in one place; YAML <-> objects; an error names the key and the line."""

from rlsafe.config.comparison import BenignConfig, CompareConfig, SelectionConfig
from rlsafe.config.data import DataConfig, StreamConfig
from rlsafe.config.errors import UnknownName, UserError, about, check_out, first_line, nearest
from rlsafe.config.loading import dotted_key, dump_yaml, load_compare, load_run, load_tree, run_from_tree
from rlsafe.config.overrides import apply_override
from rlsafe.config.rewards import NarrowConfig, RewardConfig
from rlsafe.config.sampling import SamplerConfig
from rlsafe.config.schema import (
    BatchConfig,
    CheckpointConfig,
    EvaluateConfig,
    GrpoConfig,
    LikelihoodConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    Part,
    PhaseConfig,
    RunConfig,
    ScheduleConfig,
    TrackConfig,
)

__all__ = [
    "BatchConfig",
    "BenignConfig",
    "CheckpointConfig",
    "CompareConfig",
    "DataConfig",
    "EvaluateConfig",
    "GrpoConfig",
    "LikelihoodConfig",
    "LoraConfig",
    "ModelConfig",
    "NarrowConfig",
    "OptimConfig",
    "Part",
    "PhaseConfig",
    "RewardConfig",
    "RunConfig",
    "SamplerConfig",
    "ScheduleConfig",
    "SelectionConfig",
    "StreamConfig",
    "TrackConfig",
    "UnknownName",
    "UserError",
    "about",
    "check_out",
    "apply_override",
    "dump_yaml",
    "first_line",
    "load_compare",
    "load_run",
    "load_tree",
    "dotted_key",
    "nearest",
    "run_from_tree",
]
