"""Pages that are one file: template, style and script in it, nothing fetched, nothing injected."""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
)
"""Content Security Policy: no request, and no script but ours, whatever a prompt says."""


def render(template: str, **values: Any) -> str:
    """Render a template of this folder with the style of all pages. Text in it is escaped."""
    style = (HERE / "page.css.j2").read_text()
    return _environment().get_template(template).render(style=style, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    """Make it once: it keeps what it compiles."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made.filters |= {
        "number": number,
        "size": size,
        "plain": plain,
        "breaks": breaks,
        "count": count,
    }
    return made


def script(name: str) -> Mapping[str, str]:
    """Return ``text`` of a script of this folder, and the ``policy`` of the page that has it."""
    text = (HERE / name).read_text()
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": text, "policy": POLICY.format(digest=digest)}


def number(value: float) -> str:
    """Write four figures or so, and no more digits than a table has room for."""
    if 1e-9 < abs(value) < 1e-3:  # what is smaller is rounding
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{round(value, 4) + 0.0:.4f}"


def size(count: float) -> str:
    """Write a number of bytes: 6.55 GB, 12.3 MB, 4.0 kB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def breaks(name: str) -> Markup:
    """Let a dotted name break after its parts, and not within one."""
    return Markup("<wbr>").join(
        escape(part) for part in re.findall(r"[^._+/]*[._+/]|[^._+/]+", name)
    )


def count(number: float) -> str:
    """Write how many: 11.90 billion, 2.6 million, 8,000."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,.0f}"


def plain(value: Any) -> str:
    """Write a setting as people do: null, true, 0.01, [a, b]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
