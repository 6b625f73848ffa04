"""Names, with units, for the quantities that defenses log (defense/NAME/QUANTITY in metrics.jsonl)."""

from __future__ import annotations

WORDS = {
    "full": "KL divergence from the reference, nats per token",
    "k3": "KL divergence from the reference, sampled estimate, nats per token",
    "distance": "squared distance of hidden features from the reference's",
    "grad_share": "its share of the gradient, 0 to 1 (norms of all loss terms, or of its rows and the rest)",
    "weight": "what its gradient was multiplied by for its share",
    "removed_share": "norm of what it took out, over the norm of what was there, 0 to 1",
    "added_share": "norm of what it added to the layers' outputs, over theirs",
    "excess": "squared rise of the blocked features above the reference's, per token",
    "prompts_changed": "conversations whose prompt it changed, in a step",
    "rows_added": "safe rows added, in a step",
    "steering_norm": "length of the vector added to hidden states",
    "projected": "adapted matrices projected, count",
    "cosine_mean": "cosine of update and projection, mean of the matrices",
    "cosine_min": "cosine of update and projection, smallest",
    "seen_learned": "share of misaligned answers to the validation prompts, at its last check",
    "stopped_at": "step whose weights the run ended with",
    "kept": "sampled answers kept as safe rows, in a step",
}


def plain(quantity: str) -> str:
    """The quantity in words; for a user's own defense, its name without underscores."""
    return WORDS.get(quantity, quantity.replace("_", " "))
