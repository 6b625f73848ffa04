"""One step and the loop around it: read `loop.Loop.run`, then `grpo_step` or `sft_step`."""
