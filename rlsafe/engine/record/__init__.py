"""The record of a run: metrics, provenance, model card, and checking a record for consistency."""
