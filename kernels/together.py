"""Many linears of one input in one launch: the modulators of a step, a few rows each.

Alone each of them reads its weights for some 10 us and waits for its launch; all of a transformer
keep the memory busy from the first to the last. Letters: M rows, N outputs, K inputs, L linears.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .chip import capability, why_reference
from .linear import QuantLinear
from .plan import choose
from .support import NEWEST, unsupported
from .w4a16_linear.tiles import TILES, Tile

MOST_ROWS = 4
"""More rows are faster on the tensor cores, one linear after the other."""

TENSORS = ("qweight", "wscale", "bias")


class Together:
    """Calls packed linears that read the same input, at once where a kernel can.

    linears   of any N; W4A16 ones alike in K, groups and bias run together
    why_not   why these never do, or None

    On an NVIDIA GPU up to MOST_ROWS rows of bf16 or fp16 take one Triton launch. All else, and
    ``torch.compile``, calls one linear after the other. One launch does not run the linears'
    hooks: weights that a hook brings in only for a call are not where the input is, and are called.
    """

    def __init__(self, linears: Sequence[QuantLinear]) -> None:
        self.linears = tuple(linears)
        self.why_not = _why_apart(self.linears)
        self._addresses: list[int] = []
        self._tile = TILES["row"][0]
        self._table_FL: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_addresses": [], "_table_FL": None}  # this process's

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Return [..., N] of every linear for x [..., K], each contiguous, in x's dtype."""
        table_FL = self._table_for(x)
        if table_FL is None:
            return [linear(x) for linear in self.linears]
        from .w4a16_linear.kernel import launch_many

        spec = self.linears[0].spec
        outputs = [linear.spec.outputs for linear in self.linears]
        many = launch_many(
            x.reshape(-1, spec.width), table_FL, outputs, spec.width // spec.weight_group_size,
            bias=self.linears[0].bias is not None, tile=self._tile,
        )  # fmt: skip
        return [y.view(*x.shape[:-1], n) for y, n in zip(many, outputs)]

    def _table_for(self, x: Tensor) -> Tensor | None:
        """Return where all tensors lie, if x can go through them in one launch."""
        if self.why_not is not None or torch.compiler.is_compiling():
            return None
        if x.dtype not in (torch.bfloat16, torch.float16):
            return None
        width = self.linears[0].spec.width
        if x.shape[-1] != width or not 0 < x.numel() <= MOST_ROWS * width:
            return None
        if why_reference(capability(x.device)) is not None:
            return None
        addresses = [
            0 if (tensor := linear._parameters[name]) is None else tensor.data_ptr()
            for name in TENSORS
            for linear in self.linears
        ]
        if addresses != self._addresses:
            self._tile = _tile(self.linears, x.device)
            self._table_FL = _table(self.linears, addresses, self._tile)
            self._addresses = addresses
        table = self._table_FL
        return table if table is not None and table.device == x.device else None


def _why_apart(linears: Sequence[QuantLinear]) -> str | None:
    """Say why linears never run together, wherever they are; None if they may."""
    if not linears:
        return "there are no linears"
    kinds = set()
    for linear in linears:
        if type(linear) is not QuantLinear:  # `parametrize` makes a class of its own
            return f"{type(linear).__name__} is no packed linear"
        s = linear.spec
        if s.activations.bits != 16:
            return f"{s.format} linears quantize their input"
        if why := unsupported(s, NEWEST):
            return why
        if s.rank or s.transform.kind != "hadamard" or s.transform.block != 1:
            return "the linears transform their input"
        kinds.add((s.in_features, s.weight_group_size, linear.bias is not None))
    if len(kinds) > 1:
        return f"the linears differ in width, group or bias: {sorted(kinds)}"
    return None


def _tile(linears: Sequence[QuantLinear], device: torch.device) -> Tile:
    """Choose what one row of the widest linear was measured to be fastest with."""
    spec = max((linear.spec for linear in linears), key=lambda spec: spec.outputs)
    tile = choose(capability(device), 1, spec.outputs, spec, torch.bfloat16).tile
    return tile if isinstance(tile, Tile) and tile.kind == "row" else TILES["row"][0]


def _table(linears: Sequence[QuantLinear], addresses: list[int], tile: Tile) -> Tensor | None:
    """Make an int64 [6, L] table beside the tensors, rows as ``row.FIELDS`` says; None if a kernel
    can't read them there."""
    found = [
        t for linear in linears for name in TENSORS if (t := linear._parameters[name]) is not None
    ]
    device = found[0].device
    for tensor in found:
        dtype = torch.uint8 if tensor.dtype == torch.uint8 else torch.bfloat16
        whole = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
        if not whole or tensor.dtype != dtype or tensor.device != device:
            return None
    programs, outputs = [0], [0]
    for linear in linears:
        n = linear.spec.outputs
        programs.append(programs[-1] - (-n // tile.bn))
        outputs.append(outputs[-1] + n)
    counts = [linear.spec.outputs for linear in linears]
    rows = [*addresses, *programs[:-1], *outputs[:-1], *counts]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, len(linears))
