"""4-bit codes of text encoders by GPTQ, in the metric of what calibration prompts make of them.

An encoder is run again and again, each time for as many of its linears as have room for their
second moments: an encoder of any size is calibrated in the memory of one GPU.

K channels of a linear.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.calibrate.trajectory import is_encoder, stop_at_denoisers
from dirotq.device import give_back
from dirotq.errors import NumericalError
from dirotq.kernels.full_float32 import full_float32
from dirotq.kernels.gptq import FactorizationError
from dirotq.kernels.weight_only import rounded
from dirotq.models.call import Call
from dirotq.progress import track
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt

log = logging.getLogger(__name__)

WIDEST = 20480
"""Channels of the widest linear that is calibrated: GPTQ holds three float64 matrices of K x K,
10 GB."""
ROOM = {"cuda": 16 << 30, "cpu": 2 << 30}
"""Bytes of second moments at a time; of a GPU at most half of what is free."""
BATCH = 4
"""Prompts per call of the pipeline."""
SHARE = 0.6
"""Of a GPU's free memory: an encoder that takes more is brought there layer by layer."""

Codes = dict[str, tuple[Tensor, Tensor]]
"""``weight`` and ``scale`` of linears (kernels/weight_only.py), in host memory, by their paths."""


@torch.no_grad()
def calibrated_codes(
    model: DiffusersModel,
    prompts: Sequence[Prompt],
    linears: Mapping[str, Sequence[str]],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Codes]:
    """Return the codes of ``linears`` of each text encoder, by the encoder's name.

    linears  paths, by the encoder's name; those wider than WIDEST are left out
    dtype    that the encoders compute in

    Inputs are those of the 16-bit encoders; tokens that an encoder masks are left out.

    Raises NumericalError naming a linear whose inputs are not finite, or whose second moment can't
    be factored.
    """
    pipe: Any = model.hollow(dtype, device)
    calls = _calls(pipe, model, prompts, list(linears), device)
    found: dict[str, Codes] = {}
    for name, paths in linears.items():
        encoder = getattr(pipe, name)
        narrow = [p for p in paths if encoder.get_submodule(p).in_features <= WIDEST]
        found[name] = {}
        if not calls[name]:
            log.warning("the pipeline never calls its %s: nothing calibrates its weights", name)
            continue
        for group in track(list(_groups(encoder, narrow, _room(device))), f"calibrate {name}"):
            for path, (moment_KK, rows) in _moments(
                encoder, name, group, calls[name], device
            ).items():
                weight_NK = encoder.get_submodule(path).weight.to(device)
                try:
                    codes, scale = rounded(weight_NK, 4, moment_KK, rows)
                except FactorizationError as error:
                    raise NumericalError(f"{name}.{path}: {error}") from error
                found[name][path] = codes.cpu(), scale.cpu()
        pipe.register_modules(**{name: None})
        del encoder
        give_back(device)
    return found


def _calls(
    pipe: Any,
    model: DiffusersModel,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    device: torch.device,
) -> dict[str, list[Call]]:
    """Return all calls of the encoders for these prompts, with their inputs in host memory."""
    found: dict[str, list[Call]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            if kwargs.get("past_key_values") is None:  # a text that is generated token by token
                found[name].append(Call(args, kwargs).map(lambda t: t.detach().cpu()))

        return getattr(pipe, name).register_forward_pre_hook(keep, with_kwargs=True)

    for name, module in pipe.components.items():
        if is_encoder(name, module):
            _place(module, name, device)
    if any(prompt.inputs for prompt in prompts):
        pipe.vae.to(device)  # it encodes the images that generation starts from
    hooks, batch = [hook(name) for name in names], model.batch(prompts, BATCH)
    try:
        for start in range(0, len(prompts), batch):
            with stop_at_denoisers(pipe):
                generate(pipe, prompts[start : start + batch], model.sample_arguments())
    finally:
        for each in hooks:
            each.remove()
    return found


def _moments(
    encoder: nn.Module,
    name: str,
    paths: Sequence[str],
    calls: Sequence[Call],
    device: torch.device,
) -> dict[str, tuple[Tensor, int]]:
    """Return the second moment, float32 [K, K], of the inputs of linears, and their rows."""
    sums = {path: _Sum(encoder.get_submodule(path), device) for path in paths}
    try:
        for call in calls:
            here = call.map(lambda tensor: tensor.to(device))
            mask = here.kwargs.get("attention_mask", here.args[1] if len(here.args) > 1 else None)
            for one in sums.values():
                one.mask = mask
            with full_float32():
                encoder(*here.args, **here.kwargs)
    finally:
        for one in sums.values():
            one.hook.remove()
    for path, one in sums.items():
        if not bool(one.total.isfinite().all()):
            raise NumericalError(
                f"{name}.{path}: its inputs are not finite in this precision; give another device, "
                "or text_encoders=w8, which calibrates nothing"
            )
    # What no call reaches (a tower for pictures that no prompt has) is rounded without data.
    return {path: (one.total / one.rows, one.rows) for path, one in sums.items() if one.rows}


class _Sum:
    """X^T X of a linear's inputs, but for tokens that ``mask`` [B, T] hides."""

    def __init__(self, linear: Any, device: torch.device) -> None:
        self.total = torch.zeros(linear.in_features, linear.in_features, device=device)
        self.rows = 0
        self.mask: Any = None
        self.hook = linear.register_forward_pre_hook(self._add)

    def _add(self, _: nn.Module, args: Any) -> None:
        x, mask = args[0], self.mask
        if isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
            x = x[mask.bool()]
        rows = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(rows.mT, rows)
        self.rows += len(rows)


def _groups(encoder: Any, paths: Sequence[str], room: int) -> Iterator[list[str]]:
    """Split linears, in order, into runs whose second moments fit into ``room`` bytes."""
    group: list[str] = []
    taken = 0
    for path in paths:
        size = 4 * encoder.get_submodule(path).in_features ** 2
        if group and taken + size > room:
            yield group
            group, taken = [], 0
        group.append(path)
        taken += size
    if group:
        yield group


def _room(device: torch.device) -> int:
    room = ROOM["cpu"] if device.type == "cpu" else ROOM["cuda"]
    return min(room, torch.cuda.mem_get_info(device)[0] // 2) if device.type == "cuda" else room


def _place(encoder: Any, name: str, device: torch.device) -> None:
    """Bring an encoder to a device, or let its layers come there in turn where they don't fit."""
    size = sum(t.numel() * t.element_size() for t in encoder.parameters())
    if device.type == "cuda" and size > SHARE * torch.cuda.mem_get_info(device)[0]:
        from diffusers.hooks import apply_group_offloading

        log.info("the %s's %.1f GB are brought to the GPU layer by layer", name, size / 1e9)
        apply_group_offloading(
            encoder,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=True,
        )
    else:
        encoder.to(device)
