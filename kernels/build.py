"""What a kernel is compiled from, for a launch and for tests of chips that are not here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from . import compile_cache
from .chip import chained
from .recorder import RECORDER

CHIPS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities (major * 10 + minor) that every kernel is compiled for."""

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory a program may use, by compute capability."""

FP8_CHIPS = tuple(chip for chip in CHIPS if chip >= 89)
"""Chips whose tensor cores take FP8-E4M3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A Triton kernel and all that is fixed when it is compiled.

    One function per kernel makes them, of a linear's spec, a shape and a chip. The launch and the
    list of builds call that function, so that no constant can differ between the two.
    """

    kernel: Any
    constants: Mapping[str, Any]
    """Every constexpr argument."""
    warps: int = 4
    stages: int = 3
    registers: int | None = None
    """A thread's at most; None: the compiler's choice."""
    early: bool = False
    """Whether the launch may begin while the kernel before it ends (``kernels.chip.chained``)."""

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options, by Triton's names."""
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
            "launch_pdl": self.early,
        }

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run the kernel; ``arguments`` are those that are no constants, in the kernel's order."""
        compile_cache.triton()
        compiled = self.kernel[grid](*arguments, **self.constants, **self.options)
        recorder = RECORDER.get()
        if recorder is not None:
            recorder.launched(compiled, grid, self.kernel.arg_names, arguments, self.constants)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One configuration with the types of its arguments.

    ``signature`` maps every argument that is no constant to its Triton type ("*bf16", "i32", ...),
    in the kernel's order. Pointers and i32 arguments named in ``aligned`` are multiples of 16, as
    launches on real tensors find them.
    """

    name: str
    config: Config
    signature: Mapping[str, str]
    given: Mapping[str, Any]
    """Arguments that Triton makes constants by their value: absent pointers, and strides of 1."""
    aligned: tuple[str, ...]
    chips: tuple[int, ...] = CHIPS
    tensor_core: bool = True
    """Whether a matrix instruction must appear in the machine code."""
    spills: int = 0
    """Instructions that may spill registers: few of many, where what needs none is slower."""

    @classmethod
    def of(
        cls,
        config: Config,
        types: Mapping[str, str],
        *,
        aligned: Iterable[str] = (),
        given: Mapping[str, Any] = MappingProxyType({}),
        **more: Any,
    ) -> "Build":
        """Make a build whose arguments are i32 but for ``types``; pointers are aligned too."""
        known = {*config.constants, *given}
        signature = {n: types.get(n, "i32") for n in config.kernel.arg_names if n not in known}
        lined = {n for n, kind in signature.items() if kind.startswith("*")}.union(aligned)
        return cls(
            config=config, signature=signature, given=given,
            aligned=tuple(n for n in signature if n in lined), **more,
        )  # fmt: skip

    @property
    def kernel(self) -> Any:
        return self.config.kernel

    @property
    def constants(self) -> dict[str, Any]:
        return {**self.config.constants, **self.given}


def shared_bytes(chip: int) -> int:
    """Return the shared memory a program may use: an unknown chip has its predecessor's."""
    return 1024 * SHARED_KIB[max((c for c in SHARED_KIB if c <= chip), default=80)]


def by_launch(chips: Iterable[int] = CHIPS) -> list[tuple[int, ...]]:
    """Return chips apart by whether launches chain there, which is a constant of the kernels."""
    found = [tuple(c for c in chips if chained(c) == chain) for chain in (False, True)]
    return [some for some in found if some]
