"""Errors of sites by timestep: which part of a generation a packed model disturbs.

T rows of a site, each from a call of the denoiser at one timestep.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

COLUMNS = 10
"""Timesteps that are told apart; where there are more, neighbours are taken together."""


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Of one site: squared output and squared error of each row [T], and the rows' timesteps."""

    signal_T: Tensor
    noise_T: Tensor
    timesteps: Sequence[float | None]

    @property
    def sqnr_db(self) -> float:
        return _decibel(float(self.signal_T.sum()), float(self.noise_T.sum()))


def by_timestep(
    errors: Mapping[str, RowErrors],
) -> tuple[list[float], dict[str, list[float | None]]]:
    """Return the timesteps, the largest first, and each site's output SQNR in dB at them.

    None where a site has no row. Both are empty if no timestep is known.
    """
    known = {t for found in errors.values() for t in found.timesteps if t is not None}
    distinct = sorted(known, reverse=True)
    count = min(COLUMNS, len(distinct))
    groups = [
        distinct[i * len(distinct) // count : (i + 1) * len(distinct) // count]
        for i in range(count)
    ]
    place = {t: index for index, group in enumerate(groups) for t in group}
    found: dict[str, list[float | None]] = {}
    for name, rows in errors.items() if groups else ():
        sums = [[0.0, 0.0] for _ in groups]
        for t, signal, noise in zip(
            rows.timesteps, rows.signal_T.tolist(), rows.noise_T.tolist(), strict=False
        ):
            if t is not None:
                sums[place[t]][0] += signal
                sums[place[t]][1] += noise
        found[name] = [_decibel(*pair) if any(pair) else None for pair in sums]
    return [sum(group) / len(group) for group in groups], found


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))
