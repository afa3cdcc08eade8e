"""A node of the configuration becomes an object, held first against what its class takes.

The annotations of a dataclass are the types of its settings: whatever a stage, a model or a judge
would stumble over hours later is refused here, by the name under which people set it.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
import pkgutil
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from omegaconf import DictConfig, ListConfig

from dirotq.errors import ConfigError

TARGET = "_target_"
IGNORED = ("_convert_", "_recursive_")  # what configurations for Hydra's own `instantiate` say
UNIONS = (Union, types.UnionType)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def make(node: Any, name: str) -> Any:
    """Make what ``node`` describes: ``_target_`` called with the other entries, or plain values.

    name  of the node, as overrides spell it

    Raises ConfigError for an entry that the class does not take, lacks, or takes in another type;
    DirotqError that the class itself raises.
    """
    if isinstance(node, ListConfig):
        return [make(node[i], f"{name}[{i}]") for i in range(len(node))]
    if not isinstance(node, DictConfig):
        return node
    names = {str(key): _name(node, key, name) for key in node}
    if TARGET not in node:
        return {str(key): make(node[key], names[str(key)]) for key in node}
    called, hints = _target(node, name), fields_of(node, name)
    entries = [str(key) for key in node if key not in (TARGET, *IGNORED)]
    if hints is not None:
        for entry in entries:
            if entry not in hints:
                raise no_such_setting(name, entry, hints, moved=moved(node, name, entry))
    made = {entry: make(node[entry], names[entry]) for entry in entries}
    for entry, value in made.items():
        if hints is not None:
            refuse_misfit(value, hints[entry], names[entry])
    try:
        with contextlib.suppress(ValueError):  # a builtin that has no signature
            inspect.signature(called).bind(**made)
    except TypeError as error:
        raise ConfigError(
            f"{name} can't be made from its settings: {error}; conf/ holds a value for each, so "
            "choose one of its groups, or set what is missing with +"
        ) from error
    try:
        return called(**made)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def moved(node: DictConfig, name: str, entry: str) -> str:
    """Say how the setting ``entry`` of ``node`` is spelled since it went elsewhere; else empty.

    Its class says so in ``moved``: ClassVar[Mapping[str, str]].
    """
    return getattr(_target(node, name), "moved", {}).get(entry, "") if TARGET in node else ""


def fields_of(node: DictConfig, name: str) -> dict[str, Any] | None:
    """Return {setting: annotation} of the class that ``node`` names; None if no dataclass."""
    called = _target(node, name)
    if not dataclasses.is_dataclass(called):
        return None
    hints = typing.get_type_hints(called)
    return {field.name: hints[field.name] for field in dataclasses.fields(called) if field.init}


def no_such_setting(parent: str, entry: str, known: Iterable[str], moved: str = "") -> ConfigError:
    """Return the error for the setting ``entry`` of ``parent``, which has the ``known`` ones.

    moved  how it is spelled now, if it once was there
    """
    known = sorted(known)
    full = f"{parent}.{entry}" if parent else entry
    if moved:
        return ConfigError(f"{full}: there is no such setting any more; write {moved}")
    there = f"{parent} has" if parent else "there are"
    return ConfigError(
        f"{full}: there is no such setting;{close_to(entry, known, parent)} {there} "
        f"{', '.join(known)}"
    )


def close_to(word: str, known: Iterable[str], parent: str = "") -> str:
    """Return `` did you mean `x`?``, or nothing."""
    close = difflib.get_close_matches(word.lower(), known, n=1)
    prefix = f"{parent}." if parent else ""
    return f" did you mean `{prefix}{close[0]}`?" if close else ""


def refuse_misfit(value: Any, hint: Any, name: str) -> None:
    """Raise ConfigError if ``value`` is not of the annotated type."""
    if fits(value, hint):
        return
    for inner, kind, where in _parts(value, hint):
        refuse_misfit(inner, kind, f"{name}{where}")
    number = isinstance(value, int | float)
    quotes = f"; as text it is written \"{name}='{value}'\"" if number and fits("", hint) else ""
    raise ConfigError(
        f"{name}={_shown(value)} does not fit: it is {_kind(value)}, allowed is {_allowed(hint)}"
        f"{quotes}"
    )


def fits(value: Any, hint: Any) -> bool:
    """Tell whether ``value`` is what the annotation ``hint`` says. Floats are finite; true is no 1.

    Pydantic's strict mode takes true for ``Literal[1]`` and no protocol or list for a tuple.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in UNIONS:
        return any(fits(value, option) for option in args)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if hint is None or hint is type(None):
        return value is None
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if not isinstance(kind := origin or hint, type):
        return True
    if issubclass(kind, Mapping):
        values = args[1] if len(args) == 2 else Any
        return isinstance(value, Mapping) and all(fits(v, values) for v in value.values())
    if kind is not str and issubclass(kind, Sequence):
        item = args[0] if args else Any
        return isinstance(value, list | tuple) and all(fits(v, item) for v in value)
    if getattr(kind, "_is_protocol", False):
        return not isinstance(value, str | bool | int | float | list | dict | None)
    return isinstance(value, kind)


def _parts(value: Any, hint: Any) -> Iterator[tuple[Any, Any, str]]:
    """Yield what a mapping or list holds, each with its annotation and its place."""
    for option in typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,):
        kind, args = typing.get_origin(option), typing.get_args(option)
        if not isinstance(kind, type) or not args:
            continue
        if isinstance(value, dict) and issubclass(kind, Mapping):
            yield from ((inner, args[1], f".{key}") for key, inner in value.items())
        elif isinstance(value, list) and issubclass(kind, Sequence):
            yield from ((inner, args[0], f"[{index}]") for index, inner in enumerate(value))


def _target(node: DictConfig, name: str) -> Any:
    path = str(node[TARGET])
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        advice = f"; it needs the package {missing}: pip install {missing}" if missing else ""
        raise ConfigError(
            f"{name}.{TARGET}={path} is no class that can be imported ({error}){advice}"
        ) from error
    if not callable(found):
        raise ConfigError(f"{name}.{TARGET}={path} is no class")
    return found


def _name(node: DictConfig, key: Any, parent: str) -> str:
    """Say how people set an entry: ``model: ${model}`` is set as ``model``, wherever it stands."""
    raw = node._get_node(key)
    said = raw._value() if raw is not None and raw._is_interpolation() else ""
    reference = _REFERENCE.fullmatch(str(said))
    return reference[1] if reference else f"{parent}.{key}"


def _shown(value: Any) -> str:
    plain = {None: "null", True: "true", False: "false"}
    return plain[value] if value is None or isinstance(value, bool) else f"{value!r:.60}"


def _kind(value: Any) -> str:
    if isinstance(value, float):
        return "a number with a fraction" if math.isfinite(value) else "no finite number"
    kinds = {int: "a whole number", str: "text", bool: "a truth value", list: "a list",
             dict: "a mapping", type(None): "nothing"}  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")


def _allowed(hint: Any) -> str:
    """Say an annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return " or ".join(dict.fromkeys(_allowed(option) for option in args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false",
             type(None): "null"}  # fmt: skip
    if hint in plain:
        return plain[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return f"a mapping {{name: {_allowed(args[1])}}}" if args else "a mapping"
    if isinstance(kind, type) and issubclass(kind, Sequence):
        return f"a list [{_allowed(args[0])}, ...]" if args else "a list"
    return f"one of the groups in conf/ that make {getattr(kind, '__name__', kind)}"
