"""Readers under random and damaged input: `python -m fuzz`, and a short run in the suite."""
