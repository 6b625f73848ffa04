"""From the cells' results to arms, rates and verdicts."""
