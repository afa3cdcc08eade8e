"""Keys and passwords among the settings: refused before anything is written, never repeated.

Overrides stand in every record of a run (``runs/*/.hydra``, provenance.json, the log), and fields
of requests in the recipe of an artifact that people pass on. A key belongs into an environment
variable.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException

from dirotq.errors import ConfigError
from dirotq.pipeline.quoting import setting

HIDDEN = "(not shown)"
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = (
    r"(?:api[_-]?key|apikey|access[_-]?key|private[_-]?key|secret|password|passwd|passphrase"
    r"|credentials?|authorization|bearer|auth|[a-z_-]*token|cookie)"
)
_NAME = re.compile(rf"(?:.*[_-])?{_WORD}", re.IGNORECASE)
"""A name that calls for a secret: api_key, HF_TOKEN; not max_tokens, api_key_env."""
_INSIDE = re.compile(rf"(?:^|[\W_]){_WORD}['\"]?\s*[:=]\s*['\"]?[^\s'\",}}]", re.IGNORECASE)
"""Such a name with a value, within a value: {api_key: ...}, ?token=..."""
_VALUE = re.compile(
    r"\w://[^/\s?#]*@"  # a name or password before a host
    r"|://\S*[?&](?:key|sig|signature|code)="  # (others are found by their names)
    r"|\b(?:sk|pk|rk)[-_](?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{16}"
    r"|\bhf_[A-Za-z0-9]{16}|\bgh[pousr]_[A-Za-z0-9]{16}|\bgithub_pat_|\bglpat-|\bxox[a-z]-"
    r"|\bAKIA[0-9A-Z]{12}|\bAIza[0-9A-Za-z_-]{20}|\bgsk_[A-Za-z0-9]{16}|\bnvapi-"
    r"|\bBearer\s+\S|\beyJ[\w-]{8,}\.eyJ|-----BEGIN"
    r"|\$\{oc\.env:[^}]*(?:KEY|TOKEN|SECRET|PASSW)"
)
_AWAY = (
    "Settings are written into every record of a run. Put the key into an environment variable "
    "such as OPENAI_API_KEY and name that one with judge.backend.api_key_env=OPENAI_API_KEY (the "
    "Hugging Face Hub reads HF_TOKEN, or log in with `hf auth login`; for buckets there are "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
)


def refuse_secrets(args: Sequence[str]) -> None:
    """Look through a command line. Raises ConfigError naming the setting, not what it holds."""
    for arg, shown in zip(args, without_secrets(args), strict=True):
        if arg != shown:
            name = shown.removesuffix(f"={HIDDEN}") if shown != HIDDEN else "an argument"
            raise ConfigError(f"{name} holds what looks like a key or a password. {_AWAY}")


def refuse_secret_settings(node: Any, name: str = "") -> None:
    """Look through a configuration, whichever file a value comes from."""
    for key, value in _leaves(node, name):
        if _is_secret(key, value):
            raise ConfigError(f"{key} holds what looks like a key or a password. {_AWAY}")


def without_secrets(args: Sequence[str]) -> list[str]:
    """Return a command line for a record, without whatever may be a secret."""
    shown: list[str] = []
    expected = False  # after `--token`
    for arg in args:
        _, key, value = setting(arg)
        name, value = (key.lstrip("-"), value) if "=" in arg else ("", arg)
        secret = expected or _is_secret(name, value)
        named = name and not _VALUE.search(name)
        shown.append(arg if not secret else f"{name}={HIDDEN}" if named else HIDDEN)
        expected = arg.startswith("-") and bool(_NAME.fullmatch(arg.lstrip("-")))  # no value yet
    return shown


def _is_secret(name: str, value: str) -> bool:
    if value.strip("'\" ") in ("", "null", "None"):
        return False
    last = re.split(r"[./@]", name)[-1]
    if last == "api_key_env" or last.endswith("_key_env"):
        return not all(ENV_NAME.fullmatch(word.strip("'\" ")) for word in value.split(","))
    return bool(_NAME.fullmatch(last) or _INSIDE.search(value) or _VALUE.search(value))


def _leaves(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, DictConfig):
        for key in node:
            yield from _entry(node, key, ".".join(filter(None, (name, str(key)))))
    elif isinstance(node, ListConfig):
        for index in range(len(node)):
            yield from _entry(node, index, f"{name}[{index}]")
    elif isinstance(node, str):
        yield name, node


def _entry(parent: Any, key: Any, name: str) -> Iterator[tuple[str, str]]:
    raw = parent._get_node(key)
    if raw is not None and raw._is_interpolation():
        yield name, str(raw._value())  # a copy of what stands elsewhere, or of the environment
        return
    try:
        yield from _leaves(parent[key], name)
    except OmegaConfBaseException:
        return  # no value yet: refused where it is needed
