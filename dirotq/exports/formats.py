"""The formats there are, and why one can't hold a packed model."""

from collections.abc import Iterable, Sequence

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.exports.convrot import CONVROT_W4A4
from dirotq.exports.layer_format import LayerFormat
from dirotq.exports.methods import holds, planned_by
from dirotq.exports.nvfp4 import COMFY_NVFP4, NVFP4
from dirotq.exports.svdquant import SVDQUANT_W4A4
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.packed.config import Entry
from dirotq.pipeline.settings import close_to

FORMATS = (CONVROT_W4A4, SVDQUANT_W4A4, NVFP4, COMFY_NVFP4)


def format_named(name: str) -> LayerFormat:
    """Return the format of this name; ConfigError names those there are."""
    for known in FORMATS:
        if known.name == name:
            return known
    names = [known.name for known in FORMATS]
    raise ConfigError(
        f"there is no format {name!r:.60}; use {', '.join(names)}.{close_to(str(name), names)}"
    )


def refuse_misfits(wanted: LayerFormat, entries: Sequence[Entry]) -> None:
    """Raise UnsupportedError if the format can't say how a site is quantized.

    The message names the first such site, formats that can hold this model, and the methods whose
    models this format can hold.
    """
    for site, spec in entries:
        inner = wanted.of(spec)
        if not (problems := list(inner.misfits(spec))):
            continue
        others = sum(not wanted.fits(other) for _, other in entries) - 1
        more = f" (and {others} more)" if others else ""
        raise UnsupportedError(
            f"{wanted.name} can't hold this model: {site.name}{more} has {'; '.join(problems)}. "
            f"{_instead(spec for _, spec in entries)}. {_methods(wanted, entries)}"
        )


def _instead(specs: Iterable[QuantSpec]) -> str:
    found = list(specs)
    able = [known.name for known in FORMATS if all(map(known.fits, found))]
    return f"It can be exported as {' or '.join(able)}" if able else "No other format can either"


def _methods(wanted: LayerFormat, entries: Sequence[Entry]) -> str:
    sites = [site for site, _ in entries]
    words = [one for one in wanted.packed_by if holds(wanted, planned_by(one), sites)]
    if not words:
        tried = "` and `".join(wanted.packed_by)
        return f"No plan of this transformer fits {wanted.name}: tried `{tried}`"
    return f"For {wanted.name}, pack it again with `dirotq compress {'` or `'.join(words)}`"
