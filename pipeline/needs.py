"""What one run of a stage needs of a machine, in bytes."""

from dataclasses import dataclass

__all__ = ["Needs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Memory at the peak, and what the stage leaves on the disk.

    ``bound``  the memory is an upper bound; without it, an estimate within a quarter
    ``lower``  settings that would lower the memory, for the message that refuses it
    """

    vram: float = 0.0
    ram: float = 0.0
    disk: float = 0.0
    bound: bool = False
    lower: str = ""
