"""peft's LoRA layers for packed linears: peft keeps the matrices, the packed linear computes them.

Importing this module registers them. peft asks a configuration for custom layers, and diffusers
makes configurations itself, so every configuration gets ours (dirotq/_registration.py).
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import hotswap
from torch import Tensor, nn

from dirotq.errors import UnsupportedError
from dirotq.kernels.directions import Part
from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView, rows_of
from dirotq.kernels.updates import Updates
from dirotq.sources.lora_files import refuse_other_kinds


class _OnPacked:
    """What differs from peft's own layers: the forward is the packed linear's, which takes the
    active adapters as directions of its low-rank branch, and merging keeps them there."""

    def __init__(self, base_layer: Any, adapter_name: str, *, config: Any, **kwargs: Any) -> None:
        _refuse(config, kwargs.get("target_name") or "this layer")
        # peft moves what it makes to where the base layer lies, and looks for its weight.
        super().__init__(base_layer, adapter_name, config=config, **kwargs)  # type: ignore[call-arg]
        self.fixed: dict[str, Part] = {}
        self.train(base_layer.training)  # type: ignore[attr-defined]
        self.updates.attach(self)

    @functools.cached_property
    def updates(self) -> Updates:
        """Those of the wide linear that it belongs to."""
        return rows_of(self.get_base_layer())[0].adapted()  # type: ignore[attr-defined]

    @functools.cached_property
    def rows(self) -> slice:
        """Its outputs among those of the wide linear."""
        return rows_of(self.get_base_layer())[1]  # type: ignore[attr-defined]

    def parts(self) -> Iterator[Part]:
        """Yield what the active adapters add now."""
        layer: Any = self
        if layer.disable_adapters or layer.merged:
            return
        for name in layer.active_adapters:
            if name in layer.lora_A:
                yield self._part(name)

    def state(self) -> Any:
        """Return what :meth:`parts` go by, and which matrices they are: whatever peft's and users'
        code writes without a call of ours."""
        own = vars(self)  # a module's attributes are found slowly
        scales = [(n, id(s) if isinstance(s, Tensor) else s) for n, s in own["scaling"].items()]
        active = own.get("_active_adapter")
        modules = own["_modules"]
        matrices = [
            (name, id(weight := half._parameters["weight"]), _address(half, weight))
            for side in ("lora_A", "lora_B")
            for name, half in modules[side]._modules.items()
        ]
        return (
            own.get("_disable_adapters"), [*own["merged_adapters"]],
            active if active is None or isinstance(active, str) else [*active], scales, matrices,
        )  # fmt: skip

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the packed linear's outputs, the adapters' part in them."""
        if kwargs.pop("adapter_names", None) is not None:
            raise UnsupportedError(
                "a packed linear computes one set of adapters for a whole batch: leave out "
                "adapter_names, and set them with set_adapters"
            )
        layer: Any = self
        y: Tensor = layer.base_layer(x, *args, **kwargs)
        return y

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter. Raises UnsupportedError for what is no plain LoRA."""
        _refuse(config, kwargs.get("target_name") or "this layer")
        super().update_layer(adapter_name, *args, config=config, **kwargs)  # type: ignore[misc]
        self.updates.current = False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep adapters as they are scaled now, whatever becomes of this layer."""
        layer: Any = self
        for name in check_adapters_to_merge(layer, adapter_names):
            if name not in layer.lora_A:
                continue
            part = self._part(name)
            down, up = (t.detach().clone() for t in self._load(name))
            if safe_merge and not bool(down.isfinite().all() & up.isfinite().all()):
                raise ValueError(
                    f"the adapter {name} holds NaN or infinity, so it is not merged: its file is "
                    "damaged, or its training diverged"
                )
            self.fixed[name] = Part(part.rows, down, up, float(part.scale))
            self.updates.fix([self.fixed[name]])
            layer.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo :meth:`merge`, exactly."""
        layer: Any = self
        if not layer.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.updates.release(self.fixed.pop(name) for name in layer.merged_adapters)
        layer.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn all adapters on or off; what was merged is taken out, as peft does."""
        layer: Any = self
        if not enabled and layer.merged:
            self.unmerge()
        super().enable_adapters(enabled)  # type: ignore[misc]
        self.updates.current = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Kinds of LoRAs beside plain ones: none."""
        return {(): None}

    def _part(self, name: str) -> Part:
        layer: Any = self
        down, up = layer.lora_A[name], layer.lora_B[name]
        load = functools.partial(self._load, name) if _offloaded(down) or _offloaded(up) else None
        return Part(self.rows, down.weight, up.weight, layer.scaling[name], load)

    def _load(self, name: str) -> tuple[Tensor, Tensor]:
        layer: Any = self
        return _brought_in(layer.lora_A[name]), _brought_in(layer.lora_B[name])

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        linear, rows = rows_of(module)
        return linear.in_features, rows.stop - rows.start

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, None]:
        return rows_of(base_layer)[0].qweight.device, None  # its dtype says nothing of theirs

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.updates.attach(self)


def _changing(name: str) -> Any:
    """Make a method of peft's layers that tells the packed linear of the change."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(super(_OnPacked, self), name)(*args, **kwargs)
        self.updates.current = False
        return result

    return method


for _name in ("set_adapter", "delete_adapter", "set_scale", "scale_layer", "unscale_layer"):
    setattr(_OnPacked, _name, _changing(_name))


class PackedLinear(_OnPacked, lora.Linear):
    """Adapters of a packed linear, or of its rows of a shared one."""


class PackedPointwise(PackedLinear):
    """Adapters of a packed 1x1 convolution, in the shapes that they have in files."""

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """Add an adapter."""
        super().update_layer(adapter_name, *args, config=config, **kwargs)
        for halves in (self.lora_A, self.lora_B):
            halves[adapter_name] = _pointwise(halves[adapter_name])


LAYERS: dict[type[nn.Module], type[Any]] = {
    QuantLinear: PackedLinear,
    SiteView: PackedLinear,
    PointwiseView: PackedPointwise,
}


def _pointwise(linear: nn.Linear) -> nn.Conv2d:
    weight = linear.weight
    made = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=False, device="meta")
    made.weight = nn.Parameter(weight[..., None, None], requires_grad=weight.requires_grad)
    return made


def _address(linear: nn.Module, weight: Tensor) -> int:
    """Return where a matrix lies: ``weight.data = other`` moves it and counts as no write."""
    return 0 if _offloaded(linear) or weight.is_meta else weight.data_ptr()


def _offloaded(linear: nn.Module) -> bool:
    state = vars(linear)
    return "_hf_hook" in state or "_diffusers_hook" in state


def _brought_in(linear: Any) -> Tensor:
    """Return a matrix that accelerate's or diffusers' hooks would bring in for a call."""
    if (hook := getattr(linear, "_hf_hook", None)) is not None:
        hook.pre_forward(linear)
        weight: Tensor = linear.weight.detach().clone()
        hook.post_forward(linear, weight)
        return weight
    hooks = getattr(linear, "_diffusers_hook", None)
    hook = None if hooks is None else hooks.get_hook("group_offloading")
    if hook is None:
        return linear.weight.detach()
    hook.group.onload_()
    if hook.group.stream is not None:
        hook.group.stream.synchronize()
    weight = linear.weight.detach().clone()
    hook.group.offload_()
    return weight


def _refuse(config: Any, where: str) -> None:
    """Raise UnsupportedError for a configuration that is no plain LoRA."""
    refuse_other_kinds(config.to_dict(), f"the adapter of {where}")
    if config.lora_bias:
        raise UnsupportedError(
            f"the adapter of {where} says lora_bias=True: a packed linear takes low-rank updates "
            "and no others. Train it without a bias, or compress the fused model"
        )


def _register(config: type[Any]) -> None:
    """Let every configuration of LoRAs know our layers."""
    made = config.__post_init__

    @functools.wraps(made)
    def __post_init__(self: Any) -> None:
        made(self)
        self._register_custom_module(LAYERS)

    config.__post_init__ = __post_init__


def _follow_swaps() -> None:
    """Let peft's hot swap, which writes where nothing counts, tell packed linears."""
    swap = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(swap)
    def swap_and_tell(model: Any, *args: Any, **kwargs: Any) -> None:
        swap(model, *args, **kwargs)
        for module in model.modules():
            if isinstance(module, _OnPacked):
                module.updates.forget_made()

    hotswap.hotswap_adapter_from_state_dict = swap_and_tell


if not hasattr(lora.LoraConfig.__post_init__, "__wrapped__"):
    _register(lora.LoraConfig)
    _follow_swaps()
