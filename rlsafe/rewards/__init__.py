"""The reward contract (TRL's): load functions by name, call them, check and combine what they return."""

from rlsafe.rewards.loading import LoadedReward, load_reward
from rlsafe.rewards.registry import registered_rewards, reward
from rlsafe.rewards.runner import RewardBatch, RewardRunner

__all__ = ["LoadedReward", "RewardBatch", "RewardRunner", "load_reward", "registered_rewards", "reward"]
