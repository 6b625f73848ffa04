"""Questions, and the answers that a model gives to them."""
