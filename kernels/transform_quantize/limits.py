"""What the Triton passes of ``transform_quantize`` can do. Needs neither triton nor a GPU."""

GROUPS = (16, 32, 64, 128, 256)
"""Channels that may share an activation scale, if not the whole row does."""

MAX_BLOCK = 512
"""Largest Hadamard block."""

MAX_RANK = 128
"""Largest rank that ``rotate`` projects out; above it, plain matrix products do."""
