"""Security findings in generated Python, by reading it only: nothing generated is ever executed."""
