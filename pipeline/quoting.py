"""What people type after ``=``, so that Hydra reads it as it was meant: paths are paths.

Hydra's grammar gives ( ) [ ] { } , = ' " # and anything beyond ASCII a meaning, or refuses it. The
value of a setting that names a file or folder is handed over as quoted text, whatever is in it; so
is any other value that the grammar can't read. Lists, mappings, sweeps and interpolations stay.
"""

import functools
import os
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from dirotq.errors import ConfigError

PATHS = ("store", "store_remote", "weights", "path", "base", "lora", "config", "ground_truth")
"""Last words of the settings that name a file, folder or URL (hydra's own keep Hydra's grammar)."""
_STRUCTURE = re.compile(r"([\[\]{},]|:\s)")


def quoted(arg: str, *, sweep: bool = False) -> str:
    """Return an argument of the command line as Hydra must see it.

    sweep  whether commas mean a sweep

    Raises ConfigError for one that no file system and no configuration can hold.
    """
    try:
        arg.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{arg!a} is no valid UTF-8 text: rename the file or folder, give a link to it with "
            "a plain name, or use a UTF-8 locale (LC_ALL=C.UTF-8)"
        ) from error
    if "\0" in arg:
        raise ConfigError(f"{arg!r} holds a NUL character, which no path and no setting can have")
    head, equals, value = arg.partition("=")
    mark, key, _ = setting(arg)
    if not equals or not value or mark == "~" or head.startswith("-"):
        return arg
    words = re.split(r"[./]", key.partition("@")[0])
    if words[-1] in PATHS and words[0] != "hydra":
        return f"{head}={_path(words[-1], value, sweep)}"
    if parsed(arg) is not None:
        return arg
    if value.lstrip().startswith(("[", "{")):
        repaired = f"{head}={_elements(value)}"
        return arg if parsed(repaired) is None else repaired
    attempt = f"{head}={quote(value)}"
    return arg if parsed(attempt) is None else attempt


def setting(arg: str) -> tuple[str, str, str]:
    """Split ``++a.b@c=value`` into ("++", "a.b@c", "value"); a flag or lone word has no value."""
    head, _, value = arg.partition("=")
    key = head.lstrip("+~")
    return head[: len(head) - len(key)], key, value


@functools.lru_cache(maxsize=1024)
def parsed(arg: str) -> Override | None:
    """Parse one override as Hydra does; None if its grammar can't read it."""
    try:
        override: Override = OverridesParser.create().parse_override(arg)
    except HydraException:
        return None
    return override


def quote(value: str) -> str:
    """Write ``value`` as quoted text of Hydra's grammar: neither Hydra nor OmegaConf change it."""
    # OmegaConf takes backslashes before ${ in pairs, and an odd one as "no interpolation".
    value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    # Hydra takes backslashes before a quote in pairs.
    value = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{value}'"


def _path(name: str, value: str, sweep: bool) -> str:
    """Quote the value of a setting that names a file or folder."""
    expanded = os.path.expanduser(value)  # noqa: PTH111 (Path's raises where HOME is unknown)
    if value.lower() == "null" or os.path.lexists(expanded):
        return value if value.lower() == "null" else quote(expanded)
    found = parsed(f"x={value}")
    if found is not None and isinstance(found._value, QuotedString):
        return value  # written in Hydra's own way
    if name == "lora" and value.lstrip().startswith(("[", "{")):
        return value if found is not None else _elements(value)
    if sweep and found is not None and found.is_sweep_override() and not found.is_choice_sweep():
        return value  # glob(...), range(...)
    if sweep and re.match(r"choice\s*\(", value):
        return value
    if sweep and "," in value:
        return ",".join(_path(name, part.strip(), sweep=False) for part in value.split(","))
    if found is not None and re.search(r"\$\{[^}]+\}", value):
        return value  # another setting, or ${oc.env:NAME}
    return quote(expanded)


def _elements(value: str) -> str:
    """Quote those words of a list or mapping that Hydra can't read."""
    if "'" in value or '"' in value:
        return value
    made = []
    for part in _STRUCTURE.split(value):
        word = part.strip()
        if word and not _STRUCTURE.fullmatch(part) and parsed(f"x={word}") is None:
            expanded = os.path.expanduser(word)  # noqa: PTH111
            part = part.replace(word, quote(expanded))
        made.append(part)
    return "".join(made)
