"""What packed text encoders do to the embeddings that a denoiser reads.

B prompts of a batch, T tokens.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.errors import ArtifactError
from dirotq.progress import track
from dirotq.sources.generation import generate
from dirotq.sources.prompts import Prompt

UNREAD = ("logits", "loss")
"""Outputs of language models that no pipeline conditions on."""

Calls = list[tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Inputs and outputs by name, on the CPU, of each call in turn."""


class _Reached(Exception):
    """The pipeline is about to call its denoiser: all prompts are encoded."""


def encoded(
    pipe: Any, names: Sequence[str], prompts: Sequence[Prompt], call: Mapping[str, Any], batch: int
) -> dict[str, Calls]:
    """Return all that a pipeline's text encoders read and made of the prompts, by their names."""
    found: dict[str, Calls] = {name: [] for name in names}
    hooks = [
        getattr(pipe, name).register_forward_hook(_recorder(found[name]), with_kwargs=True)
        for name in names
    ]
    hooks.append(pipe.transformer.register_forward_pre_hook(_stop, prepend=True))
    try:
        for start in track(range(0, len(prompts), batch), "text encoders"):
            with contextlib.suppress(_Reached):
                generate(pipe, prompts[start : start + batch], call, output="latent")
    finally:
        for hook in hooks:
            hook.remove()
    return found


def embedding_errors(want: Mapping[str, Calls], got: Mapping[str, Calls]) -> list[dict[str, Any]]:
    """Compare the packed encoders' outputs with the 16-bit ones', tokens under a mask left out.

    Returns per encoder and output {"encoder", "output", "sqnr_db"}.

    Raises ArtifactError unless both encoders read the same tokens and masks.
    """
    rows = []
    for name, calls in want.items():
        signal: dict[str, float] = defaultdict(float)
        noise: dict[str, float] = defaultdict(float)
        if len(calls) != len(got[name]):
            raise ArtifactError(f"the packed {name} was called another number of times")
        for (inputs, outputs), (same, made) in zip(calls, got[name], strict=True):
            if inputs.keys() != same.keys() or any(
                not torch.equal(t, same[key]) for key, t in inputs.items()
            ):
                raise ArtifactError(
                    f"the packed {name} read other tokens or masks than the 16-bit one: their "
                    "tokenizers differ. Pack the model again"
                )
            mask = inputs.get("attention_mask")
            for key, wanted in outputs.items():
                a, b = (_seen(t.double(), mask) for t in (wanted, made[key]))
                signal[key] += a.square().sum().item()
                noise[key] += (a - b).square().sum().item()
        rows += [
            {"encoder": name, "output": key, "sqnr_db": _decibels(signal[key], noise[key])}
            for key in signal
        ]
    return rows


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else 200.0


def _seen(output: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows of [B, T, ...] that a mask [B, T] shows; all of anything else."""
    if mask is None or mask.shape != output.shape[:2]:
        return output
    return output[mask.bool()]


def _recorder(calls: Calls) -> Any:
    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Pipelines name what follows the tokens, but for a mask that some give second.
        named = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        calls.append((_tensors(named, floating=False), _tensors(output, floating=True)))

    return record


def _tensors(values: Any, *, floating: bool) -> dict[str, Tensor]:
    """Return the floating tensors among outputs, or the others among inputs, by name."""
    items = values.items() if hasattr(values, "items") else enumerate(values)
    found = {}
    for key, value in items:
        each = value if isinstance(value, tuple | list) else [value]
        name = str(key) if not isinstance(key, int) else f"output {key}"
        for i, tensor in enumerate(each):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() == floating:
                label = name if each is not value else f"{name} {i}"
                if name not in UNREAD:
                    found[label] = tensor.detach().cpu()
    return found


def _stop(module: nn.Module, args: Any) -> None:
    raise _Reached
