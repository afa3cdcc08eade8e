"""Whether a format holds the plans that settings of `dirotq compress` lead to."""

from collections.abc import Sequence

from dirotq.errors import DirotqError
from dirotq.exports.layer_format import LayerFormat
from dirotq.models.family import Site
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.settings import make
from dirotq.quantize.plan import Method

CONF = "dirotq.conf"
RANK = 16


def planned_by(words: str) -> Method:
    """Return the method that overrides choose, a line of them. This takes a third of a second."""
    method: Method = make(compose_config(words.split(), CONF).method, "method")
    return method


def holds(wanted: LayerFormat, method: Method, sites: Sequence[Site]) -> bool:
    """Tell whether a format can say all of a method's plan of these sites; modulators aside."""
    try:
        specs = [method.spec(site, RANK) for site in sites if site.kind == "block"]
    except DirotqError:
        return False
    return all(spec is None or not any(wanted.misfits(spec)) for spec in specs)
