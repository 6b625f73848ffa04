"""Judges of answers: finding one by name, its prompts, reading its replies."""
