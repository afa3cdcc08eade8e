"""Record the denoiser's calls while a pipeline generates, with one component in memory at a time.

First every prompt is encoded and the text encoders are dropped; then the transformer is loaded and
generates latents, without an image decoder. Both halves are the pipeline's own ``__call__``.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.models.call import Call
from dirotq.models.skeleton import move_buffers
from dirotq.quiet import heed, quiet
from dirotq.sources.completeness import absent
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt

from .replay import HostArena

log = logging.getLogger(__name__)


class _Reached(Exception):
    """The pipeline is about to call its denoiser: all prompts are encoded."""


class Trajectories:
    """A pipeline that generates latents for batches of prompts and hands out its denoiser's calls.

    vram  bytes of GPU memory to stay within: a transformer that needs more than three quarters of
          it is streamed from host memory, block by block
    """

    def __init__(
        self, model: DiffusersModel, dtype: torch.dtype, device: torch.device, vram: int | None
    ) -> None:
        self.model, self.dtype, self.device, self.vram = model, dtype, device, vram
        self.call = model.call_arguments()
        self.pipe = _open(model, dtype, device)
        self.made: list[Call] = []
        """Every call of the last generation."""
        self._encoded: dict[str, Any] = {}

    def encode(self, shards: Sequence[Sequence[Prompt]]) -> None:
        """Run the text encoders on every batch, remember the results, and free the encoders."""
        pipe = self.pipe
        encoders = [n for n, m in pipe.components.items() if _is_encoder(n, m)]
        if not hasattr(pipe, "encode_prompt"):
            log.info("%s has no encode_prompt: its text encoders stay loaded", type(pipe).__name__)
        for name in encoders:
            getattr(pipe, name).to(self.device)
        if any(prompt.inputs for shard in shards for prompt in shard):
            pipe.vae.to(self.device)  # it encodes the images that generation starts from
        if not hasattr(pipe, "encode_prompt"):
            return
        plain = pipe.encode_prompt
        pipe.encode_prompt = self._remembering(plain, anew=True)
        hook = pipe.transformer.register_forward_pre_hook(_raise_reached)
        try:
            for shard in shards:
                with contextlib.suppress(_Reached):
                    generate(pipe, shard, self.call, output="latent")
        finally:
            hook.remove()
        pipe.encode_prompt = self._remembering(plain, anew=False)
        pipe.register_modules(**dict.fromkeys(encoders))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load_transformer(self) -> None:
        """Give the transformer its weights, on the GPU or streamed to it."""
        transformer = self.pipe.transformer
        weights = self.model.weights()
        size = sum(p.numel() for p in transformer.parameters()) * self.dtype.itemsize
        stream = self.device.type == "cuda" and self.vram is not None and size > self.vram * 3 // 4
        names = list(transformer.state_dict())
        keep = HostArena().keep if stream else None
        weights.fill(transformer, names, self.device, self.dtype, keep=keep)
        if stream:
            log.info("the transformer's %.1f GB are streamed from host memory", size / 1e9)
            transformer.enable_group_offload(
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=True,
                non_blocking=True,
            )
        else:
            move_buffers(transformer, self.device)

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

        def on_call(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = {k: v for k, v in kwargs.items() if k != "return_dict"}
            made.append(Call(args, given).map(keep))

        hook = self.pipe.transformer.register_forward_pre_hook(
            on_call, with_kwargs=True, prepend=True
        )
        try:
            generate(self.pipe, shard, self.call, output="latent")
        finally:
            hook.remove()
        return [made[i] for i in choose(len(made))]

    def _remembering(self, plain: Callable[..., Any], *, anew: bool) -> Callable[..., Any]:
        """Return an ``encode_prompt`` that knows all earlier results; ``anew`` adds others to them.

        Without it, what is not known are given embeddings: a pipeline only reshapes them, and needs
        no encoder for that.
        """

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            key = repr((args, kwargs))
            if key not in self._encoded:
                if not anew:
                    return plain(*args, **kwargs)
                with torch.no_grad():
                    self._encoded[key] = _to(plain(*args, **kwargs), torch.device("cpu"))
            return _to(self._encoded[key], self.device)

        return encode_prompt


def _raise_reached(*_: Any) -> None:
    raise _Reached


def _is_encoder(name: str, module: Any) -> bool:
    return isinstance(module, nn.Module) and not name.startswith(("transformer", "vae"))


def _to(value: Any, device: torch.device) -> Any:
    return Call((value,), {}).map(lambda tensor: tensor.to(device)).args[0]


def _open(model: DiffusersModel, dtype: torch.dtype, device: torch.device) -> Any:
    """Open the pipeline on the CPU, its transformer without weights; it says ``device``."""
    import diffusers

    folder = model.folder()
    with quiet() as said:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder,
            # nn.Module's `to`: diffusers' own warns about what it would keep in float32.
            transformer=nn.Module.to(model.skeleton(), dtype),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **absent(folder),
        )
    heed(said)
    pipe.set_progress_bar_config(disable=True)
    # diffusers takes the first component's device for the pipeline's; ours come and go.
    here = property(lambda _: device)
    pipe.__class__ = type(
        type(pipe).__name__, (type(pipe),), {"device": here, "_execution_device": here}
    )
    return pipe
