"""What a LoRA file holds: pairs of matrices, and what peft notes about them (alphas, ranks).

Names are diffusers' and peft's, or those that diffusers converts. A converter of diffusers gets
every pair with its alpha worked in already, and has to use every tensor: converters pass over
alphas, and over tensors of another layout, without a word.

The scale of a module is alpha / r, or alpha / sqrt(r) with ``use_rslora``. ``alpha_pattern`` and
``rank_pattern`` are regular expressions that have to match the end of a module's name, from a dot
on; the first one counts.
"""

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.files.json_file import json_object, read_json
from dirotq.quiet import quiet

from .traced import left_out, plain, traced

FUSE = "Fuse it with the program that trained it and compress the fused model"
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
_PART = re.compile(
    r"(?P<peft_model>base_model\.model\.)?(?P<root>transformer\.)?(?P<module>.+?)\."
    r"(?:lora_(?P<peft>[AB])(?:\.(?P<adapter>[\w-]+))?|lora[._](?P<old>down|up))\.weight"
)
_ALPHA = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?(?P<module>.+?)(?:\.lora)?\.alpha")
_FAR = re.compile(r"\d{5}")


@dataclass(frozen=True, slots=True)
class Half:
    """One matrix of a pair."""

    key: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Pair:
    """What a file holds of one module: ``down`` [R, K], ``up`` [N, R], or only one of them.

    trained_as  the module's name where it was trained, which peft's patterns speak of
    """

    trained_as: str
    down: Half | None = None
    up: Half | None = None
    alpha: Half | None = None

    @property
    def rank(self) -> int:
        """R, or 0 if there is none."""
        return self.down.tensor.shape[0] if self.down and self.down.tensor.ndim else 0

    @property
    def halves(self) -> Iterator[Half]:
        return (half for half in (self.down, self.up, self.alpha) if half is not None)


def pairs_in(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return {module: pair}, and the other tensors; ConfigError if two claim one place."""
    found: dict[str, Pair] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if match := _PART.fullmatch(key):
            side = {"A": "down", "B": "up"}.get(match["peft"], match["old"])
            module = match["module"]
            pair = found.get(module, Pair((match["root"] or "") + module))
            if not match["peft_model"]:
                pair = replace(pair, trained_as=module)
        elif match := _ALPHA.fullmatch(key):
            side, module = "alpha", match["module"]
            pair = found.get(module, Pair(module))
        else:
            rest[key] = tensor
            continue
        if (other := getattr(pair, side)) is not None:
            raise ConfigError(
                f"{name} holds two tensors for one place, {other.key} and {key} (two adapters, or "
                "two layouts, in one file); save a copy with only one of them"
            )
        filled: dict[str, Any] = {side: Half(key, tensor)}
        found[module] = replace(pair, **filled)
    return found, rest


def converted(
    pairs: Mapping[str, Pair],
    scales: Mapping[str, float],
    rest: Mapping[str, Tensor],
    pipeline: str,
    name: str,
) -> tuple[dict[str, Tensor], str]:
    """Convert to diffusers' names, with all alphas worked in, by the pipeline's own converter.

    scales   by module, worked into ``up`` in float32
    returns  the tensors, or none and why there are none

    Raises ConfigError if the converter leaves tensors out.
    """
    import diffusers

    convert = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    if convert is None:
        return {}, f"diffusers converts no LoRA for {pipeline}"
    given = dict(rest)
    neutral = {}
    for module, pair in pairs.items():
        for half in pair.halves:
            given[half.key] = half.tensor
        if pair.up is not None and scales[module] != 1:
            given[pair.up.key] = pair.up.tensor.float() * scales[module]
        if pair.alpha is not None and pair.rank:  # converters ask for it
            neutral[pair.alpha.key] = torch.tensor(float(pair.rank))
    if far := next((key for key in given if _FAR.search(key)), None):
        return {}, f"no model has as many blocks as {far} says"  # a converter would count so far
    weights = {key: tensor for key, tensor in given.items() if key not in neutral}
    try:
        state, lost = _through(convert, weights, neutral)
    except Exception as error:  # noqa: BLE001 - it was not written for such keys: the finding
        return {}, f"diffusers' converter for {pipeline}: {type(error).__name__} {error!s:.120}"
    _refuse_lost(lost, pipeline, name)
    return plain({key: t for key, t in state.items() if key not in neutral}), ""


def with_alphas(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor] | None:
    """Work the alphas of sd-scripts' layout into a file's matrices; None for other layouts.

    diffusers' converter passes over some of them, and counts for ever with negative ones.

    Raises ConfigError for an alpha that is no number or zero.
    """
    if not any(".lora_down.weight" in key for key in tensors):
        return None
    made = dict(tensors)
    for pair in pairs_in(tensors, name)[0].values():
        if pair.alpha is None or pair.up is None or not pair.rank:
            continue
        alpha = pair.alpha.tensor
        value = number(alpha.item() if alpha.numel() == 1 else None, f"{name}: {pair.alpha.key}")
        made[pair.up.key] = pair.up.tensor.float() * (value / pair.rank)
        made[pair.alpha.key] = torch.tensor(float(pair.rank))
    return made


def converted_whole(
    tensors: Mapping[str, Tensor], pipeline: type[Any], name: str
) -> dict[str, Tensor]:
    """Return what a pipeline's converter of diffusers makes of a file, and see that it uses it all.

    Of what it can't convert nothing is returned: loading then says why.

    Raises ConfigError if it leaves tensors out.
    """
    alphas = {key: tensor for key, tensor in tensors.items() if _ALPHA.fullmatch(key)}
    weights = {key: tensor for key, tensor in tensors.items() if key not in alphas}
    convert: Any = getattr(pipeline, "lora_state_dict")  # noqa: B009 - of a mixin
    try:
        state, lost = _through(convert, weights, alphas)
    except Exception:  # noqa: BLE001 - loading meets it again, and tells
        return {}
    _refuse_lost(lost, pipeline.__name__, name)
    return plain(state)


def _through(
    convert: Any, weights: Mapping[str, Tensor], alphas: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Return what a converter makes of a file, and in words what it left out of the weights."""
    marked = traced(weights)
    more = "return_alphas" in inspect.signature(convert).parameters
    with quiet() as said:
        made = convert(marked | dict(alphas), **({"return_alphas": True} if more else {}))
    state = made[0] if isinstance(made, tuple) else made
    lost = [key for key in left_out(marked, state) if bool(weights[key].count_nonzero())]
    if said:
        return state, said[0][:300]
    return state, f"it passes over {len(lost)} tensors, such as {lost[:3]}" if lost else ""


def _refuse_lost(lost: str, pipeline: str, name: str) -> None:
    if lost:
        raise ConfigError(
            f"{name} is not understood as a whole by diffusers' converter for {pipeline}: {lost}. "
            f"{FUSE}, or save a copy without these tensors"
        )


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
    if type(value) not in (int, float):
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
    refuse_other_kinds(values, where)
    for field in PATTERNS:
        _refuse_patterns(values.get(field), field, where)
    return Settings(where, values)


def refuse_other_kinds(values: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedError for peft's settings of anything but plain low-rank sums."""
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
            f"low-rank updates. {FUSE}"
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
