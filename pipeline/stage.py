"""What a stage is, and how its configuration becomes a fingerprint."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from dirotq.errors import ConfigError


@runtime_checkable
class Stage(Protocol):
    """One cached step: a frozen dataclass whose fields are its configuration.

    ``run(out, *, slot: Artifact, ...)`` reads its inputs (one keyword per slot, wired in
    conf/pipeline; one with the default None may be left out), writes files under ``out`` and
    returns the scalars worth keeping as metrics.
    ``version`` is bumped by hand when the same configuration would give another result.

    A stage that sets ``resumable: ClassVar[bool] = True`` finds what an interrupted run left in
    ``out``; every other stage always starts with an empty folder.
    """

    version: ClassVar[str]

    # Loose on purpose: mypy takes `*args: Any, **kwargs: Any` as "any signature", while each
    # stage spells out its slots; `dag.plan` holds them against the wiring.
    def run(self, *args: Any, **kwargs: Any) -> Mapping[str, float]: ...


def untracked(**options: Any) -> Any:
    """Declare a field that cannot change the result (device, a batch size proven harmless)."""
    return dataclasses.field(metadata={"tracked": False}, **options)


def recipe(obj: Any) -> Any:
    """Return the JSON value that identifies ``obj``.

    An object with a method ``identity()`` is identified by what that returns (the content digest of
    a model folder, the sha256 of a prompt file) instead of by its fields; any other dataclass by
    its class, its version if it has one, and its tracked fields. A class that has moved since it
    was first recorded says in ``recorded_as`` what it was called then.

    Raises ConfigError for anything that has no stable identity.
    """
    if obj is None or isinstance(obj, bool | int | float | str):
        return obj
    if isinstance(obj, Path):
        raise ConfigError(
            f"cannot fingerprint the path {obj}: a path says nothing about the content behind it; "
            "wrap it in an object with an identity() method, or mark the field untracked()"
        )
    if isinstance(obj, Mapping):
        return {str(key): recipe(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [recipe(value) for value in obj]
    if not isinstance(obj, type):
        if callable(identity := getattr(obj, "identity", None)):
            return recipe(identity())
        if dataclasses.is_dataclass(obj):
            return _dataclass_recipe(obj)
    raise ConfigError(
        f"cannot fingerprint a {type(obj).__name__} ({obj!r}); make it a dataclass, give it an "
        "identity() method, or mark the field untracked()"
    )


def fingerprint(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of ``value`` as canonical JSON.

    Raises ConfigError if ``value`` holds nan or an infinity, which JSON cannot carry.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"cannot fingerprint {value!r}: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dataclass_recipe(obj: Any) -> dict[str, Any]:
    cls = type(obj)
    head = {"class": getattr(cls, "recorded_as", f"{cls.__module__}.{cls.__qualname__}")}
    if hasattr(cls, "version"):
        head["version"] = cls.version
    tracked = [field for field in dataclasses.fields(obj) if field.metadata.get("tracked", True)]
    return head | {field.name: recipe(getattr(obj, field.name)) for field in tracked}
