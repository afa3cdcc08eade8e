"""Block Hadamard transform: spreads what a rotation left over evenly over each block."""

from .reference import Kind, block_hadamard, hadamard_block, hadamard_matrix

__all__ = ["Kind", "block_hadamard", "hadamard_block", "hadamard_matrix"]
