"""Record the denoiser's calls while a pipeline generates, with one component in memory at a time.

First every prompt is encoded and the text encoders are dropped; then the transformer is loaded and
generates latents, without an image decoder. Both halves are the pipeline's own ``__call__``.
"""

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dirotq.device import give_back
from dirotq.models.call import Call, digest_of
from dirotq.models.denoisers import denoisers_of
from dirotq.models.skeleton import move_buffers
from dirotq.sources.components import DENOISER
from dirotq.sources.generation import foreign, generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.opening import SHARE, module_bytes
from dirotq.sources.prompts import Prompt
from dirotq.sources.turns import Turns, free_memory, share_memory, take_turns
from dirotq.sources.weights import Weights

from .replay import HostArena

log = logging.getLogger(__name__)

FITS = 0.75
"""Of the memory to stay within, what weights on the GPU may take."""
ENCODES = ("encode_prompt", "encode_image")
"""Methods of pipelines that run an encoder."""


class _Reached(Exception):
    """The pipeline is about to call its denoiser: all prompts are encoded."""


class Trajectories:
    """A pipeline that generates latents for batches of prompts and hands out its denoiser's calls.

    vram  bytes of GPU memory to stay within: a transformer that needs more than three quarters of
          it is streamed from host memory, block by block; several that do take turns
    """

    def __init__(
        self, model: DiffusersModel, dtype: torch.dtype, device: torch.device, vram: int | None
    ) -> None:
        self.model, self.dtype, self.device, self.vram = model, dtype, device, vram
        self.call = model.sample_arguments()
        self.pipe: Any = model.hollow(dtype, device)
        self.made: list[Call] = []
        """Every call of the last generation."""
        self._encoded: dict[str, Any] = {}
        self._encoding = False

    def encode(self, shards: Sequence[Sequence[Prompt]]) -> None:
        """Run the text encoders on every batch, remember the results, and free the encoders.

        A component that a pipeline runs itself, outside of :data:`ENCODES`, stays: it runs in every
        generation (LTX-2's connectors between text and transformer).
        """
        pipe = self.pipe
        encoders = {n for n, m in pipe.components.items() if is_encoder(n, m)}
        if not hasattr(pipe, "encode_prompt"):
            log.info("%s has no encode_prompt: its text encoders stay loaded", type(pipe).__name__)
        for name in encoders:
            getattr(pipe, name).to(self.device)
        if any(prompt.inputs for shard in shards for prompt in shard):
            pipe.vae.to(self.device)  # it encodes the images that generation starts from
        if not hasattr(pipe, "encode_prompt"):
            return
        plain = {name: getattr(pipe, name) for name in ENCODES if hasattr(pipe, name)}
        for name, encode in plain.items():
            setattr(pipe, name, self._remembering(encode, anew=True))
        own: set[str] = set()
        notes = [
            getattr(pipe, name).register_forward_pre_hook(partial(self._note_own, own, name))
            for name in encoders
        ]
        for shard in shards:
            with foreign(type(pipe).__name__), stop_at_denoisers(pipe):
                generate(pipe, shard, self.call, output="latent")
        for note in notes:
            note.remove()
        for name, encode in plain.items():
            setattr(pipe, name, self._remembering(encode, anew=False))
        pipe.register_modules(**dict.fromkeys(encoders - own))
        give_back(self.device)

    def load_transformer(self) -> None:
        """Give the denoisers their weights: all at once, one at a time, or streamed to the GPU."""
        parts, weights = denoisers_of(self.pipe), self.model.weights_apart()
        each = list(map(module_bytes, parts.values()))
        on_gpu = self.device.type == "cuda"
        room = FITS * self.vram if on_gpu and self.vram is not None else math.inf
        streamed = max(each) > room
        if len(parts) > 1:
            room = min(room, SHARE * free_memory(self.device))
        if streamed:
            self._stream(parts, weights)
        elif len(parts) > 1 and sum(each) > room:
            log.info("%s take turns: there is no room for all of them", " and ".join(parts))
            take_turns(parts, weights, self.dtype, Turns(self.device))
        else:
            for part, denoiser in parts.items():
                names = list(denoiser.state_dict())
                weights[part].fill(denoiser, names, self.device, self.dtype)
                move_buffers(denoiser, self.device)

    def _stream(self, parts: Mapping[str, Any], weights: Mapping[str, Weights]) -> None:
        """Let denoisers wait in page-locked memory, all in that of one, and come block by block."""
        size = sum(map(module_bytes, parts.values()))
        log.info("the transformer's %.1f GB are streamed from host memory", size / 1e9)
        share_memory(parts, weights, self.dtype, Turns(self.device), HostArena().keep)
        for denoiser in parts.values():
            denoiser.enable_group_offload(
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=True,
                non_blocking=True,
            )

    def record(self, shard: Sequence[Prompt], choose: Callable[[int], Sequence[int]]) -> list[Call]:
        """Generate one batch; return the calls that ``choose(number of calls made)`` names, on the
        CPU.
        """
        self.made = made = []
        copies: dict[int, tuple[Tensor, int, Tensor]] = {}

        def keep(tensor: Tensor) -> Tensor:
            # One copy of what all steps share. The original is held, so its id is not used again.
            found = copies.get(id(tensor))
            if found is None or found[1] != tensor._version:
                found = (tensor, tensor._version, tensor.detach().cpu())
                copies[id(tensor)] = found
            return found[2]

        def on_call(part: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = {k: v for k, v in kwargs.items() if k != "return_dict"}
            made.append(Call(args, given, part).map(keep))

        hooks = [
            denoiser.register_forward_pre_hook(
                partial(on_call, part), with_kwargs=True, prepend=True
            )
            for part, denoiser in zip(
                self.model.prefixes, denoisers_of(self.pipe).values(), strict=True
            )
        ]
        try:
            with foreign(type(self.pipe).__name__):
                generate(self.pipe, shard, self.call, output="latent")
        finally:
            for hook in hooks:
                hook.remove()
        return [made[i] for i in choose(len(made))]

    def _note_own(self, own: set[str], name: str, *_: Any) -> None:
        if not self._encoding:
            own.add(name)

    def _remembering(self, plain: Callable[..., Any], *, anew: bool) -> Callable[..., Any]:
        """Return an encoder that knows all earlier results; ``anew`` adds others to them.

        Without it, what is not known are given embeddings: a pipeline only reshapes them, and needs
        no encoder for that.
        """

        def encode(*args: Any, **kwargs: Any) -> Any:
            key = repr((plain.__name__, tree_map(_told, (args, kwargs))))
            if key not in self._encoded:
                if not anew:
                    return plain(*args, **kwargs)
                self._encoding = True
                with torch.no_grad():
                    self._encoded[key] = _to(plain(*args, **kwargs), torch.device("cpu"))
                self._encoding = False
            return _to(self._encoded[key], self.device)

        return encode


def _told(value: Any) -> Any:
    """Return what tells one argument from others: the content of tensors and pictures."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), digest_of(value)
    if isinstance(value, Image):
        return value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest()
    return value


@contextlib.contextmanager
def stop_at_denoisers(pipe: Any) -> Iterator[None]:
    """Leave the block where the pipeline is about to call a denoiser."""
    hooks = [
        denoiser.register_forward_pre_hook(_raise_reached, prepend=True)
        for denoiser in denoisers_of(pipe).values()
    ]
    try:
        with contextlib.suppress(_Reached):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _raise_reached(*_: Any) -> None:
    raise _Reached


def is_encoder(name: str, module: Any) -> bool:
    """Tell whether a component of a pipeline turns texts or pictures into what denoisers read."""
    # An autoencoder's statistics scale latents (LTX-2's audio_vae), whether it decodes them or not.
    return isinstance(module, nn.Module) and "vae" not in name and DENOISER not in name


def _to(value: Any, device: torch.device) -> Any:
    return Call((value,), {}).map(lambda tensor: tensor.to(device)).args[0]
