"""What a model that was packed from its weights alone lacks, and how it is got."""

import shlex

GAINS = {"tiny-flux": 0.0, "tiny-pixart": 0.0}
"""PSNR that calibration adds in the same number formats, dB (docs/choose.md has the command)."""


def advice(model: str = "FOLDER") -> str:
    """Say what calibration would add, and the command for it.

    model  what ``model=`` takes
    """
    gains = " and ".join(f"{gain:.1f} dB on {name}" for name, gain in GAINS.items())
    return (
        f"Packed from the weights alone. Calibration added {gains}, at the same speed: "
        f"dirotq compress model={shlex.quote(model)} method=dirotq_w4a8_int8"
    )
