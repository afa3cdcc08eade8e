"""Rounding where no input was ever seen, and what calibration would add to it.

Letters: N outputs, K main-branch inputs, G groups per row.
"""

import shlex

import torch
from torch import Tensor

from dirotq.kernels.formats.weight import Element
from dirotq.kernels.full_float32 import full_float32
from dirotq.kernels.gptq import gptq

WIDEST = 4096
"""Columns that are rounded together: more cost time by their square, memory too."""
DAMPING = 1.0
"""Multiple of the guess's mean diagonal that is added to it: half of what is believed is that all
directions are alike."""
GAINS = {"tiny-flux": 7, "tiny-pixart": 5}
"""About what calibration adds with 8-bit activations, dB of PSNR (docs/choose.md has how)."""


def guessed_codes(w_NK: Tensor, codes_NK: Tensor, step_NG: Tensor, element: Element) -> Tensor:
    """Return codes chosen by GPTQ with the second moment that the weights themselves suggest.

    Layers that were trained together are balanced: the weights that write a tensor and those that
    read it have the same Gram matrix (Du, Hu and Lee, arXiv 1806.00900). So of white inputs far
    above, what reaches a linear has the moment S = WᵀW, and after the transform W_zᵀ W_z. Trained
    networks are far from this; half of the guess is the identity, with which GPTQ is rounding to
    nearest. Moments between the parts of a wide site are taken for zero.

    w_NK      float32, [N, K], rotated weights
    codes_NK  int8, [N, K], the nearest ones
    step_NG   steps of the grid, [N, G]
    returns   int8, [N, K]
    """
    width = part_of(w_NK.shape[1], w_NK.shape[1] // step_NG.shape[1])
    found = []
    for start in range(0, w_NK.shape[1], width):
        w_Nk = w_NK[:, start : start + width].contiguous()
        with full_float32():
            s_kk = (w_Nk.mT @ w_Nk).double()
        if not bool(s_kk.any()):  # nothing to round
            found.append(codes_NK[:, start : start + width])
            continue
        steps = step_NG
        if steps.shape[1] > 1:
            group = w_NK.shape[1] // step_NG.shape[1]
            steps = step_NG[:, start // group : (start + width) // group]
        found.append(gptq(w_Nk, s_kk, steps, damping=DAMPING, element=element)[0])
    return torch.cat(found, 1)


def part_of(columns: int, group: int) -> int:
    """Return the most columns that are rounded together: a divisor of all, in whole groups.

    At most WIDEST, where there is one; ``group`` is all columns of a scale.
    """
    step = group if group < columns else 1
    fitting = (n for n in range(1, columns + 1) if columns % n == 0)
    return next((w for n in fitting if (w := columns // n) <= WIDEST and w % step == 0), columns)


def advice(model: str = "FOLDER") -> str:
    """Say what calibration would add, and the command for it.

    model  what ``model=`` takes
    """
    gains = " and ".join(f"{gain} dB on {name}" for name, gain in GAINS.items())
    return (
        f"Packed from the weights alone. Calibration adds about {gains}: "
        f"dirotq compress model={shlex.quote(model)} method=dirotq_w4a8_int8"
    )
