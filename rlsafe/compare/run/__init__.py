"""Carries a grid out: on this process, on several, on a Ray cluster."""
