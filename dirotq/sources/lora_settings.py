"""What peft notes about a LoRA (alphas, ranks), read by peft's rules.

The scale of a module is alpha / r, or alpha / sqrt(r) with ``use_rslora``. ``alpha_pattern`` and
``rank_pattern`` are regular expressions that have to match the end of a module's name, from a dot
on; the first one counts.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.files.json_file import json_object, read_json

METADATA = "lora_adapter_metadata"  # where diffusers notes them, in the header of the file
SETTINGS = "adapter_config.json"  # where peft notes them, beside the file
PATTERNS = ("alpha_pattern", "rank_pattern")
DEFAULT_ALPHA = 8
"""What peft takes where settings name none."""
QUANTIFIERS = 4
OTHER_KINDS = (
    "use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication", "use_bdlora",
)  # fmt: skip
OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of ``init_lora_weights`` whose LoRA is no sum with the weights of the model itself."""


@dataclass(frozen=True, slots=True)
class Settings:
    """peft's settings of one LoRA; ``where`` names them in errors. Empty: nothing is noted."""

    where: str
    values: Mapping[str, Any]

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of up @ down for a module whose tensors have this rank.

        module  named as in the model that was trained

        Raises ConfigError if peft would refuse the settings for these tensors.
        """
        if not self.values:
            return 1.0
        noted = self._chosen("rank_pattern", module, self.values.get("r"))
        if noted is not None and noted != rank:
            raise ConfigError(
                f"{self.where} notes the rank {noted!r:.40} for {module}, whose tensors have rank "
                f"{rank}: it belongs to another LoRA, or one of the two is damaged"
            )
        alpha = self._chosen("alpha_pattern", module, self.values.get("lora_alpha", DEFAULT_ALPHA))
        alpha = number(alpha, f"{self.where}: the alpha of {module}")
        return alpha / (rank**0.5 if self.values.get("use_rslora") else rank)

    @property
    def patterns(self) -> bool:
        """Do some modules have an alpha or a rank of their own?"""
        return any(self.values.get(field) for field in PATTERNS)

    def _chosen(self, field: str, module: str, otherwise: Any) -> Any:
        for pattern, value in (self.values.get(field) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return otherwise


def number(value: Any, what: str) -> float:
    """Return an alpha, a finite number that is not zero. Raises ConfigError."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{what} is {value!r:.40}, not a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or found == 0:
        raise ConfigError(
            f"{what} is {found}: no update, or no number; what the program that trained it would "
            "do with that is unknown. Save the LoRA anew"
        )
    return found


def read_settings(file: Path, metadata: Mapping[str, str]) -> Settings:
    """Read the settings in the file's header (diffusers), or else beside it (peft).

    Raises ConfigError if they are damaged, UnsupportedError if they describe another kind.
    """
    beside = file.parent / SETTINGS
    if METADATA in metadata:
        where = f"{METADATA} in the header of {file}"
        values = json_object(metadata[METADATA], where, "LoRA")
        # Of other components (text_encoder.r) nothing is used.
        values = {k.removeprefix("transformer."): v for k, v in values.items()}
    elif beside.is_file():
        where = str(beside)
        values = read_json(beside, "LoRA")
    else:
        return Settings(str(file), {})
    _refuse_other_kinds(values, where)
    for field in PATTERNS:
        _refuse_patterns(values.get(field), field, where)
    return Settings(where, values)


def _refuse_other_kinds(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("peft_type", "LORA")
    start = values.get("init_lora_weights")
    other = next((f"{name}={values[name]!r:.60}" for name in OTHER_KINDS if values.get(name)), None)
    if kind != "LORA":
        other = f"peft_type={kind!r:.60}"
    elif isinstance(start, str) and start.lower().startswith(OTHER_STARTS):
        other = f"init_lora_weights={start!r:.60}"
    if other:
        raise UnsupportedError(
            f"{where} says {other}: what it describes is no plain sum of the model's weights and "
            "low-rank updates. Fuse it with the program that trained it and compress the fused "
            "model"
        )


def _refuse_patterns(patterns: Any, field: str, where: str) -> None:
    if not isinstance(patterns, Mapping | None):
        raise ConfigError(f"{where}: {field} is {patterns!r:.60}, not a mapping of names")
    for pattern in patterns or {}:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{where}: {field} names {pattern!r:.60}, which is no regular expression ({error})"
            ) from error
        # Such expressions may take for ever, and no module's name needs them.
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > QUANTIFIERS:
            raise ConfigError(
                f"{where}: {field} names {pattern!r:.60}, a regular expression of repetitions "
                f"within repetitions; at most {QUANTIFIERS} are taken, and none of a group"
            )
