"""One small call of a whole pipeline without its weights: whether its parts fit each other.

What shapes of weights don't tell shows when a pipeline is called: the axes of a rotation that don't
make a head, latents of other channels than the autoencoder's, a scheduler that wants other
arguments. All of it depends on configurations alone, so noise stands for weights
(models/hollow.py).
"""

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn, no_grad
from torch.utils._pytree import tree_leaves

from dirotq.quiet import quiet

from .denoiser_call import NOISE, SIZE, pipeline_without_denoiser, smallest
from .denoisers import MAIN
from .hollow import Cheaply, hollow

FRAMES = 9
"""Of a video: as many as every autoencoder takes that puts four or eight of them together."""
MOST = {"height": SIZE, "width": SIZE, "num_frames": FRAMES}
ASKING = ("retrieve_timesteps", "calculate_shift")
"""Functions by which pipelines ask a scheduler or its config for timesteps."""
PLAIN = (bool, int, str, type(None))


class UnreachedError(Exception):
    """The pipeline stopped before its denoiser and scheduler: it may lack what nobody gave it."""


def rehearse(folder: Path, **arguments: Any) -> None:
    """Call a pipeline once, at no more than 256 x 256 pixels and nine frames, up to its image.

    A denoiser runs once for all calls of one shape: the number of steps costs little.

    folder     a diffusers folder, of whose weights nothing is read
    arguments  of the pipeline's call: they win over the smallest sensible ones, but for the size

    Raises UnreachedError, and whatever the pipeline raises that does not fit itself.
    """
    reached: list[str] = []
    try:
        with quiet(), no_grad(), Cheaply():
            pipe = pipeline_without_denoiser(folder, NOISE)
            for name, part in pipe.components.items():
                if MAIN in name and isinstance(part, nn.Module):
                    pipe.register_modules(**{name: _once(hollow(part), reached)})
            pipe(**_small(smallest(pipe) | arguments), output_type="pt")
    except Exception as error:
        if reached or _in_scheduler(error):
            raise
        raise UnreachedError(f"{type(error).__name__}: {error}") from error


def _small(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: min(value, MOST[name]) if name in MOST and type(value) is int else value
        for name, value in arguments.items()
    }


def _once(denoiser: Any, reached: list[str]) -> Any:
    """Let a denoiser run once for all calls that look alike; ``reached`` notes that it was called.

    A call that hands it an object, as a cache is, may change that: it always runs.
    """
    plain: Callable[..., Any] = denoiser.forward
    made: dict[Any, Any] = {}

    @functools.wraps(plain)
    def run(*args: Any, **kwargs: Any) -> Any:
        reached.append(type(denoiser).__name__)
        look = [_look(leaf) for leaf in tree_leaves((args, kwargs))]
        if None in look:
            return plain(*args, **kwargs)
        key = (*kwargs, *look)
        if key not in made:
            made[key] = plain(*args, **kwargs)
        return made[key]

    denoiser.forward = run
    return denoiser


def _look(value: Any) -> Any:
    """Return what shapes may depend on; None of an object."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, float):
        return float
    return (type(value), value) if isinstance(value, PLAIN) else None


def _in_scheduler(error: Exception) -> bool:
    """Tell whether a scheduler refused what its pipeline asks of it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(
        f.f_code.co_name in ASKING
        or str(f.f_globals.get("__name__")).startswith("diffusers.schedulers.")
        for f in frames
    )
