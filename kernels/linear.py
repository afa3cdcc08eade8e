"""The packed linear: what ``pack`` writes, the loader rebuilds and the runtime calls.

Letters: M rows, N outputs of all linears, D channels.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .buffers import Packed, buffer_dtype, buffer_shapes
from .chip import capability
from .effective_weight import effective_weight
from .formats.spec import QuantSpec
from .plan import Plan, choose
from .updates import Updates


class QuantLinear(nn.Module):
    """All linears that read one site, as one wide packed linear (docs/method.md M1, M2).

    It is only ever read by a call, ``linear(x, rows=...)``: whatever brings its tensors in for a
    call (accelerate, diffusers), or watches it, wraps the call.

    Adapters add to its outputs through ``updates``, None until one does (kernels/updates.py).

    Its tensors are those of :class:`.buffers.Packed`, by the same names (portable layout, the same
    on disk and in ``state_dict``; absent ones are None). They are parameters without gradients, and
    not buffers, which offloading leaves where they are. Outputs have the input's dtype.
    """

    qweight: Tensor
    wscale: Tensor
    wglobal: Tensor | None
    basis: Tensor | None
    rotation: Tensor | None
    smooth: Tensor | None
    wp: Tensor | None
    wpscale: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: QuantSpec, *, bias: bool, device: Any = None) -> None:
        super().__init__()
        self.spec = spec
        self._key = ops.format_key(spec)
        self.updates: Updates | None = None
        for name, shape in buffer_shapes(spec, bias=bias).items():
            dtype = buffer_dtype(spec, name)
            empty = None if shape is None else torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, None if empty is None else frozen(empty))

    def forward(self, x: Tensor, rows: slice | None = None) -> Tensor:
        """Map x [..., D] to [..., N], all linears' outputs side by side, or ``rows`` of them alone.

        Raises ValueError if x has another number of channels, is not floating point or lies on
        another device than the packed tensors.
        """
        self._check(x)
        # A module's attributes are found slowly; one with parametrizations has a class of its own.
        t = self._parameters if type(self) is QuantLinear else self.packed()._asdict()
        y = ops.quant_linear(
            x, t["qweight"], t["wscale"], t["wglobal"], t["basis"], t["rotation"], t["wp"],
            t["bias"], self._key, t["smooth"], t["wpscale"],
            None if rows is None else [rows.start, rows.stop], **self._directions(),
        )  # fmt: skip
        if y.requires_grad and not torch.compiler.is_compiling():
            y.register_hook(_no_gradient)
        return y

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.outputs

    @property
    def weight(self) -> Tensor:
        """The 16-bit weight that this linear stands for, computed at every look."""
        return _weight(self, slice(0, self.spec.outputs))

    def adapted(self) -> Updates:
        """Return the updates of this linear, which there may be none of yet."""
        if self.updates is None:
            self.updates = Updates()
        return self.updates

    def renew(self) -> None:
        """Make the directions of the updates, if they have changed."""
        if self.updates is not None:
            self.updates.renew(self.packed(), self.spec)

    def _directions(self) -> dict[str, Tensor]:
        updates = self.updates
        if updates is None:
            return {}
        # Compiled code can't look: who calls it looks before (dirotq/runtime/compiled.py).
        if not (torch.compiler.is_compiling() and updates.current):
            _renew(self)
        made = updates.made
        return {} if made is None else {"down": made.down, "up": made.up}

    def packed(self) -> Packed:
        """Return the tensors, as kernels take them."""
        return Packed(
            self.qweight, self.wscale, self.wglobal, self.basis, self.rotation, self.smooth,
            self.wp, self.wpscale, self.bias,
        )  # fmt: skip

    def plan(self, rows: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
        """Return which kernels run a call of so many rows of ``dtype`` where the module now is."""
        return choose(capability(self.qweight.device), rows, self.spec.outputs, self.spec, dtype)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.spec.in_features:
            raise ValueError(
                f"x has {x.shape[-1]} channels {tuple(x.shape)}; this linear takes "
                f"{self.spec.in_features}"
            )
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ValueError(f"x is {x.dtype}; use bfloat16, float16 or float32")
        weight = self._parameters.get("qweight", x)
        assert weight is not None
        if x.device != weight.device:
            raise ValueError(
                f"x is on {x.device}, the packed weights are on {weight.device}; move one of them"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moving a model to a compute dtype must not re-round scales and bases: only devices change.
        def moved(tensor: Tensor) -> Tensor:
            after: Tensor = fn(tensor)
            return after if after.dtype == tensor.dtype else tensor.to(after.device)

        if self.updates is not None:
            self.updates.moved(moved)
        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"{s.in_features} -> {list(s.out_features)}, {s.format}, r={s.rank}, {s.transform.kind}"
        )


class SiteView(nn.Module):
    """One linear of a shared site: rows of the site's wide linear, without state of its own.

    ``shared``  what the views of one site have in common; None: it reads alone
    """

    site: Any

    def __init__(self, site: nn.Module, rows: slice, shared: "SharedRead | None" = None) -> None:
        super().__init__()
        # Not a submodule: the site's tensors appear once in the state dict, under the site's name.
        object.__setattr__(self, "site", site)
        self.output_rows = rows
        self.shared = shared

    @property
    def in_features(self) -> int:
        return int(self.site.spec.in_features)

    @property
    def out_features(self) -> int:
        return int(self.output_rows.stop - self.output_rows.start)

    @property
    def qweight(self) -> Tensor:
        """Its codes: peft asks where a layer lies."""
        return self.site.qweight[self.output_rows]

    @property
    def weight(self) -> Tensor:
        """The 16-bit weight of its rows, computed at every look."""
        return _weight(self.site, self.output_rows)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.site.bias
        return None if bias is None else bias[self.output_rows]

    def forward(self, x: Tensor) -> Tensor:
        if self.shared is None or torch.compiler.is_compiling():  # a pass joins compiled reads
            return self.site(x, rows=self.output_rows)
        return self.shared.read(x, self.output_rows)

    def extra_repr(self) -> str:
        return f"rows {self.output_rows.start}:{self.output_rows.stop} of the site"


class Read(NamedTuple):
    """A tensor that a view read, and all that the site made of it, if it did."""

    x: weakref.ref[Tensor]
    version: int
    taken: frozenset[int]
    """First rows of the views that have theirs."""
    y: Tensor | None


class SharedRead:
    """Lets a site be computed once for all its views, where they read one tensor.

    A network hands the same tensor to q, k and v, one after the other: the first view to read it
    computes every view's rows. They are kept until each view has its own, or the tensor is gone.
    Views that were seen to read different tensors compute their own rows, and so do all in
    inference mode, where nothing tells whether a tensor was written to in between.
    """

    def __init__(self, site: nn.Module, views: int) -> None:
        self.site: Any = site
        self.views = views
        self._joint = True
        self._last: Read | None = None

    def read(self, x: Tensor, rows: slice) -> Tensor:
        """Return ``rows`` of what the site makes of x."""
        if x.is_inference():
            return self.site(x, rows=rows)
        last = self._last
        again = (
            last is not None
            and last.x() is x
            and last.version == x._version
            and rows.start not in last.taken
        )
        if last is not None and again:
            self._joint = True
            taken = last.taken | {rows.start}
            self._last = last._replace(taken=taken) if len(taken) < self.views else None
            return self.site(x, rows=rows) if last.y is None else last.y[..., rows]
        if last is not None and last.y is not None:
            self._joint = False  # not every view read the last one
        y = self.site(x) if self._joint else None
        self._last = Read(weakref.ref(x, self._gone), x._version, frozenset({rows.start}), y)
        return self.site(x, rows=rows) if y is None else y[..., rows]

    def _gone(self, x: "weakref.ref[Tensor]") -> None:
        last = self._last
        if last is not None and last.x is x:
            self._joint = last.y is None and self._joint
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}


class PointwiseView(nn.Module):
    """A 1x1 convolution's place: its channels go last, through a linear, and back.

    ``linear``  the site's wide linear, or a :class:`SiteView` of it; no submodule, as there
    """

    linear: Any

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "linear", linear)

    in_channels = property(lambda self: self.linear.in_features)
    out_channels = property(lambda self: self.linear.out_features)
    qweight = property(lambda self: self.linear.qweight)
    bias = property(lambda self: self.linear.bias)
    # What a 1x1 convolution has beside its channels.
    kernel_size = stride = dilation = (1, 1)
    padding, groups, padding_mode = (0, 0), 1, "zeros"

    @property
    def weight(self) -> Tensor:
        """The 16-bit kernel, [N, D, 1, 1], computed at every look."""
        weight: Tensor = self.linear.weight
        return weight[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, N, ...] of x [B, D, ...], in channels-last memory: tokens stay as they lie."""
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def rows_of(linear: Any) -> tuple[QuantLinear, slice]:
    """Return the wide linear that a packed module reads, and which of its outputs are its own."""
    inner = linear.linear if isinstance(linear, PointwiseView) else linear
    if isinstance(inner, SiteView):
        return inner.site, inner.output_rows
    return inner, slice(0, inner.spec.outputs)


def _weight(site: Any, rows: slice) -> Tensor:
    weight = effective_weight(site.packed().rows(rows), site.spec)
    for part in () if site.updates is None else site.updates.fixed:
        low, high = max(part.rows.start, rows.start), min(part.rows.stop, rows.stop)
        if low < high:
            up, down = (t.flatten(1).float().to(weight.device) for t in (part.up, part.down))
            up = up[low - part.rows.start : high - part.rows.start]
            weight[low - rows.start : high - rows.start] += float(part.scale) * (up @ down)
    return weight


@torch._disable_dynamo
def _renew(linear: QuantLinear) -> None:
    linear.renew()


def _no_gradient(gradient: Tensor) -> Tensor:
    raise RuntimeError(
        "a packed linear has no gradient for its input; train the network before it is packed, or "
        "call this one under torch.no_grad()"
    )


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a tensor as a packed linear holds it."""
    return nn.Parameter(tensor, requires_grad=False)
