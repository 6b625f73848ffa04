"""One step and the loop around it: read `loop.train_steps`, then `grpo_step` or `sft_step`."""
