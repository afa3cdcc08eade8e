"""``quantization_config`` of a packed transformer, read from a file that anybody may have written.

Everything is looked at before a number in it reaches torch: a site of 10^9 channels costs nothing.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import nn

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.kernels.formats.lm4 import LEVELS
from dirotq.kernels.formats.spec import ADDED, FIELDS, QuantSpec
from dirotq.models.families import known_family
from dirotq.models.family import Kind, Site, is_linear, is_pointwise

FORMAT = 3
"""Newest format: 2 adds NVFP4 and MXFP4, smoothing, regular Hadamard matrices, root mean squares,
branches beside the input and 8-bit ones; 3 adds LM4 and leading bits of 8-bit
integers. Folders say the oldest that has all they use,
so that old readers go on."""
WIDEST = 1 << 20
"""Channels or rows; no linear comes near, and the checks of a spec count up to them."""

SITE = {"name", "consumers", "dim", "rows", "kind", "bias"}
SPEC_TEXT = {"transform", "weight_scale", "act_scale", "branch"}
SPEC_NUMBERS = {
    "dim", "rank", "block", "weight_bits", "weight_group", "act_bits", "act_group",
    "protected_bits",
}  # fmt: skip

Entry = tuple[Site, QuantSpec]


def read_packing(sites: Any, packing: Any, levels: Any = None) -> list[Entry]:
    """Read ``sites`` of a ``quantization_config`` in network order; ``packing`` is its ``format``.

    levels  what the file says LM4's levels are, for readers that don't know them; they are the
            format's, and there if a site has that element

    Raises UnsupportedError for a newer format; ArtifactError for anything that this version would
    not have written: a missing or unknown field, a value of another kind or out of its range, a
    name that is used twice.
    """
    if type(packing) is int and packing > FORMAT:
        raise UnsupportedError(
            f"this model is packed in format {packing}; this DiRotQ reads up to {FORMAT}. "
            "Upgrade: pip install -U dirotq"
        )
    if type(packing) is not int or packing < 1:
        raise _damaged(f"format is {packing!r:.60}, not a number from 1 to {FORMAT}")
    if not isinstance(sites, list):
        raise _damaged(f"sites is {sites!r:.60}, not a list")
    entries = [_entry(value, f"site {i} of {len(sites)}") for i, value in enumerate(sites, 1)]
    taken: dict[str, str] = {}
    for site, _ in entries:
        for name in {site.name, *site.linears}:
            if name in taken:
                raise _damaged(f"{name} belongs to the sites {taken[name]} and {site.name}")
            taken[name] = site.name
    _check_levels(levels, [site.name for site, s in entries if s.weights.element == "lm4"])
    return entries


def check_places(transformer: nn.Module, entries: Iterable[Entry]) -> None:
    """Hold the sites against the 16-bit transformer (on the meta device) that they go into.

    Raises ArtifactError naming the first that is no linear of these dimensions, or the site whose
    path is taken; UnsupportedError if the family's table does not fit the class, as with another
    version of diffusers.
    """
    modules = dict(transformer.named_modules())
    family = known_family(type(transformer).__name__)
    table = {} if family is None else {s.name: s.linears for s in family.sites(transformer)}
    for site, _ in entries:
        for name, rows in zip(site.linears, site.out_features, strict=True):
            linear: Any = modules.get(name)
            if linear is None or not is_linear(linear):
                raise _damaged(f"{name} is no linear of a {type(transformer).__name__}")
            found = (*linear.weight.shape[:2], linear.bias is not None, is_pointwise(linear))
            wanted = (rows, site.in_features, site.bias, site.pointwise)
            if found != wanted:
                raise _damaged(
                    f"{name} has (outputs, inputs, bias, 1x1 convolution) = {found} in this "
                    f"{type(transformer).__name__}, {wanted} in site {site.name}"
                )
        parent, _, leaf = site.name.rpartition(".")
        alone = site.linears == (site.name,) and not site.pointwise
        around = modules.get(parent)
        if not alone and (around is None or is_linear(around) or hasattr(around, leaf)):
            raise _damaged(f"site {site.name}: its path is taken, or leads nowhere")
        if (known := table.get(site.name, site.linears)) != site.linears:
            # Fused blocks read a site's outputs in the order of the family's table.
            raise _damaged(f"site {site.name} has the consumers {site.linears}, not {known}")


def _check_levels(levels: Any, sites: list[str]) -> None:
    if levels is None and not sites:
        return
    if levels is None:
        raise _damaged(f"it lacks levels, and the weights of {sites[0]} are LM4")
    if not sites:
        raise _damaged(f"it has levels {levels!r:.60}, and no site has LM4 weights")
    plain = isinstance(levels, list) and all(type(level) is float for level in levels)
    if not plain or tuple(levels) != LEVELS:
        raise _damaged(f"levels is {levels!r:.80}; LM4's are {list(LEVELS)}")


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, Mapping) or value.keys() != {"site", "spec"}:
        raise _damaged(f"{where} is {value!r:.60}, not an object of `site` and `spec`")
    site, spec = _site(value["site"], where), _spec(value["spec"], where)
    if (site.in_features, site.out_features) != (spec.in_features, spec.out_features):
        raise _damaged(
            f"{site.name} has {site.in_features} channels and rows {list(site.out_features)}, "
            f"its spec {spec.in_features} and {list(spec.out_features)}"
        )
    return site, spec


def _site(value: Any, where: str) -> Site:
    fields = _fields(value, f"{where}, site", SITE, SITE | {"pointwise", "text"})
    consumers, rows = fields["consumers"], _rows(fields["rows"], where)
    for path in (fields["name"], *(consumers if isinstance(consumers, list) else [None])):
        parts = path.split(".") if isinstance(path, str) else [""]
        if not all(part.isidentifier() or part.isdecimal() for part in parts):
            raise _damaged(f"{where} names {path!r:.60}, which is no path of a module")
    if not 0 < len(consumers) == len(set(consumers)) == len(rows):
        raise _damaged(f"{where} has {len(consumers)} consumers and {len(rows)} numbers of rows")
    if fields["kind"] not in get_args(Kind):
        raise _damaged(f"{where} is of the kind {fields['kind']!r:.60}, not {get_args(Kind)}")
    for flag in ("bias", "pointwise", "text"):
        if not isinstance(fields.get(flag, False), bool):
            raise _damaged(f"{where}: {flag} is {fields[flag]!r:.60}, not true or false")
    _number(fields["dim"], f"{where}: dim", least=1)
    return Site.from_record(fields)


def _spec(value: Any, where: str) -> QuantSpec:
    fields = _fields(value, f"{where}, spec", FIELDS - ADDED.keys(), FIELDS)
    for name in fields.keys() & SPEC_NUMBERS:
        _number(fields[name], f"{where}: {name}", least=0)
    for name in fields.keys() & SPEC_TEXT:
        if not isinstance(fields[name], str):
            raise _damaged(f"{where}: {name} is {fields[name]!r:.60}, not a text")
    if not isinstance(fields.get("smooth", False), bool):
        raise _damaged(f"{where}: smooth is {fields['smooth']!r:.60}, not true or false")
    if fields["dim"] < 1:
        raise _damaged(f"{where}: dim is {fields['dim']}, not a number above 0")
    try:
        return QuantSpec.from_dict(fields | {"rows": _rows(fields["rows"], where)})
    except (ValueError, ArithmeticError) as error:
        raise _damaged(f"{where}: {error}") from error


def _fields(value: Any, where: str, needed: set[str], known: set[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _damaged(f"{where} is {value!r:.60}, not an object")
    if missing := sorted(needed - value.keys()):
        raise _damaged(f"{where} lacks {', '.join(missing)}")
    if unknown := sorted(map(str, value.keys() - known)):
        raise _damaged(f"{where} has unknown fields: {', '.join(unknown):.60}")
    return dict(value)


def _rows(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise _damaged(f"{where}: rows is {value!r:.60}, not a list of numbers")
    return tuple(_number(rows, f"{where}: rows", least=1) for rows in value)


def _number(value: Any, what: str, *, least: int) -> int:
    if type(value) is not int or not least <= value <= WIDEST:
        raise _damaged(f"{what} is {value!r:.60}, not a whole number from {least} to {WIDEST}")
    return value


def _damaged(problem: str) -> ArtifactError:
    return ArtifactError(
        f"the quantization_config of this packed transformer is damaged: {problem}. Download the "
        "model again, or pack it again with `dirotq compress`"
    )
