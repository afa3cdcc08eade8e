"""From overrides to a pipeline that can be planned or run. Nothing behind sees a DictConfig."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirotq.errors import ConfigError
from dirotq.pipeline import dag
from dirotq.pipeline.executor import Executor
from dirotq.pipeline.idle import refuse_idle
from dirotq.pipeline.importing import no_collecting
from dirotq.pipeline.machine import refuse_device
from dirotq.pipeline.quoting import parsed, quote, quoted, setting
from dirotq.pipeline.remote_store import RemoteStore
from dirotq.pipeline.secrecy import refuse_secret_settings, refuse_secrets
from dirotq.pipeline.settings import (
    TARGET,
    close_to,
    fields_of,
    make,
    moved,
    no_such_setting,
    refuse_misfit,
)
from dirotq.pipeline.store import Artifact, ArtifactStore
from dirotq.pipeline.wording import reworded

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@\s,]+)?")
PAGE = re.compile(r"https?://(?:huggingface\.co|hf\.co)/(\w[\w.-]*/\w[\w.-]*)")
PLAIN: Mapping[str, Any] = {
    "until": str | None,
    "force": str | list[str],
    "store": str,
    "store_remote": str | None,
    "store_push": bool,
    "weights": str,
    "device": str,
    "dtype": str,
    "text_encoders": str,
    "preflight": bool,
    "verbose": bool,
    "objectives": list[str],
    "pipeline": Mapping[str, Mapping[str, str]],
}
"""Types of the settings that belong to no class."""

STUMBLES = (
    HydraException, OmegaConfBaseException,
    ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip
"""What composing raises: Hydra has no word of its own for some values."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Everything a configuration says, built.

    remote  {step that will be pulled: its bytes}
    push    whether artifacts go to the remote store too
    """

    steps: list[dag.Step]
    store: ArtifactStore
    executor: Executor
    force: frozenset[str]
    remote: Mapping[str, int] = field(default_factory=dict)
    push: bool = False

    def todo(self) -> list[dag.Step]:
        """List the steps to run: those that are neither here nor in the remote store."""
        return [s for s in self.steps if not self.cached(s) and s.name not in self.remote]

    def cached(self, step: dag.Step) -> Artifact | None:
        """Return the step's artifact if it is there, and nobody asked to make it again."""
        forced = step.name in self.force
        return None if forced else self.store.get(step.name, step.fingerprint)


@no_collecting()
def build(cfg: DictConfig) -> Pipeline:
    """Instantiate the stages that ``cfg.pipeline`` wires, up to ``cfg.until``.

    What a cached step would check before it runs was checked when it ran.

    Raises ConfigError for a setting of the wrong type, a wrong wiring, an unknown name in ``until``
    or ``force``, a device that isn't there, or whatever the checks of a stage to run refuse.
    """
    try:
        refuse_secret_settings(cfg)
        for key in sorted(OmegaConf.missing_keys(cfg)):
            raise ConfigError(f"{key} has no value; set it with {key}=...")
        _refuse_plain_misfits(cfg)
        wiring: Any = OmegaConf.to_container(cfg.pipeline, resolve=True)
        for name in wiring:
            if name not in cfg:
                raise ConfigError(
                    f"conf/pipeline names the stage {name!r}, which has no configuration"
                )
        force = [cfg.force] if isinstance(cfg.force, str) else list(cfg.force)
        for name in force:
            if name not in wiring:
                raise ConfigError(
                    f"force={name}: no such stage; this pipeline has {', '.join(wiring)}"
                )
        running = dag.order(wiring, cfg.until)
        for name in force:
            if name not in running:
                raise ConfigError(
                    f"force={name}: until={cfg.until} does not run it; leave one of the two out"
                )
        stages = {name: make(cfg[name], name) for name in running}
        executor = make(cfg.executor, "executor")
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(reworded(error)) from error
    for name, stage in stages.items():
        if isinstance(device := getattr(stage, "device", None), str):
            setting = "device" if device == cfg.get("device") else f"{name}.device"
            refuse_device(device, setting)
            executor.refuse(device, setting)
    url, push = cfg.get("store_remote"), bool(cfg.get("store_push"))
    if push and not url:
        raise ConfigError("store_push=true says nothing of where to: add store_remote=URL")
    pipeline = Pipeline(
        steps=dag.plan(stages, wiring),
        store=ArtifactStore(cfg.store, RemoteStore(url) if url else None),
        executor=executor,
        force=frozenset(force),
        push=push,
    )
    pipeline = replace(pipeline, remote=_to_pull(pipeline))
    for step in pipeline.todo():
        if callable(check := getattr(step.stage, "check", None)):
            check()
    return pipeline


def _to_pull(pipeline: Pipeline) -> dict[str, int]:
    """Ask the remote store, if any, for what is missing; {step: bytes}."""
    if (remote := pipeline.store.remote) is None:
        return {}
    found = {}
    for step in pipeline.todo():
        if step.name not in pipeline.force and (m := remote.manifest(step.name, step.fingerprint)):
            found[step.name] = sum(entry["bytes"] for entry in m["files"].values())
    return found


def compose_config(overrides: Sequence[str], module: str) -> DictConfig:
    """Compose what ``overrides`` make of the config tree in the package ``module``.

    Raises ConfigError for an override that can't be read, that names no setting, or that holds
    what looks like a key or a password.
    """
    refuse_secrets(overrides)
    words = with_model_folder(overrides, module)
    _refuse_unreadable(words)
    with _hydra(module):
        _refuse_no_choices(words)
        try:
            cfg = compose("config", overrides=words)
        except STUMBLES as error:
            roots = _roots(module)
            chosen = [word for word in words if setting(word)[1] in roots]  # groups, without values
            raise ConfigError(
                reworded(error, lambda: compose("config", overrides=chosen))
            ) from error
        _refuse_unknown(cfg, module)
        if appended := [word for word in words if _appends(word)]:
            plain = cfg
            with suppress(*STUMBLES):  # a later word changes what was appended
                plain = compose("config", [word for word in words if word not in appended])
            for word in appended:
                _refuse_appended(cfg, plain, setting(word)[1])
        refuse_idle(cfg, words, module)
    return cfg


def with_model_folder(overrides: Sequence[str], module: str, *, sweep: bool = False) -> list[str]:
    """Turn ``model=<folder>`` into ``model=local model.path=<folder>``; the rest stays as it is,
    but for the quotes that Hydra wants (pipeline/quoting.py).

    So do a file and a hub id (``org/name[@revision]``). A config name wins over a folder of the
    same name, and a folder over a hub id. Raises ConfigError if the value is nothing of these.
    """
    result = []
    models = [place for place, word in enumerate(overrides) if word.startswith("model=")]
    for place, override in enumerate(overrides):
        if place in models[:-1]:
            continue  # the last one counts, as of any setting; an earlier one's path would win
        words = quoted(override, sweep=sweep)  # refuses what can be no setting, whatever it names
        group, _, value = override.partition("=")
        if group != "model" or not value:
            result.append(words)
            continue
        with _hydra(module):
            known = GlobalHydra.instance().config_loader().get_group_options("model")
        if set(value.split(",")) <= set(known):  # a comma: a sweep over several models
            result.append(override)
        elif (path := _model_path(value)) is not None:
            result += ["model=local", f"model.path={quote(path)}"]
        elif found := PAGE.match(value):
            raise ConfigError(f"model={value} is an address; give the hub id, model={found[1]}")
        else:
            raise ConfigError(
                f"model={value}: no such model.{close_to(value, known).replace(' d', ' D')} Known "
                f"models are {', '.join(known)}; the path of an existing diffusers folder or "
                ".safetensors file works too, and so does the hub id of a diffusers pipeline "
                "(org/name, org/name@revision)"
            )
    return result


def search_path(module: str, folder: str) -> str:
    """Return the override that has groups looked up in a folder of the user's too."""
    there = _primary(module).get("hydra", {}).get("searchpath", [])
    added = quote(f"file://{Path(folder).absolute()}")
    return f"hydra.searchpath=[{','.join([*there, added])}]"


def groups(module: str) -> dict[str, list[str]]:
    """Return {group: its choices} of the config tree in the package ``module``."""
    with _hydra(module):
        loader = GlobalHydra.instance().config_loader()
        names = [name for name in loader.list_groups("") if name != "hydra"]
        return {name: loader.get_group_options(name) for name in names}


def _model_path(value: str) -> str | None:
    """Return an existing folder or file, absolute; a hub id as it is; else None."""
    local = Path(os.path.expanduser(value))  # noqa: PTH111 (Path's raises where HOME is unknown)
    if local.exists() or local.suffix == ".safetensors":  # a missing file has a message of its own
        return str(local.absolute())
    return value if HUB_ID.fullmatch(value) else None


def _refuse_unreadable(words: Sequence[str]) -> None:
    for word in words:
        if word.startswith("-"):
            raise ConfigError(
                f"{word} is an option of `dirotq compress` alone; here are only settings, such as "
                "rank.r=32"
            )
        if parsed(word) is None or not setting(word)[1]:
            raise ConfigError(
                f"{word} is no setting that can be read: write NAME=VALUE, such as rank.r=32; a "
                "list in [ ], a mapping in { }, and text with commas or brackets in quotes of its "
                "own: \"NAME='some, text'\""
            )


def _refuse_no_choices(words: Sequence[str]) -> None:
    """Refuse a number where a group wants the name of a choice (rank=64); Hydra names no group."""
    for word in words:
        _, key, value = setting(word)
        plain = isinstance(found := parsed(word), Override) and found.value()
        if type(plain) not in (int, float) or "." in key:
            continue
        if known := GlobalHydra.instance().config_loader().get_group_options(key):
            hint = f"; the number itself is rank.r={value}" if key == "rank" else ""
            raise ConfigError(
                f"{word}: {key} is a group of the configuration, and its choices are "
                f"{', '.join(known)}{hint}"
            )


@contextmanager
def _hydra(module: str) -> Iterator[None]:
    """Start Hydra's compose API on ``module``, unless Hydra is running already."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_module(module, version_base="1.3"):
            yield


def _refuse_plain_misfits(cfg: DictConfig) -> None:
    for name, kind in PLAIN.items():
        if name in cfg:
            value = cfg[name]
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            refuse_misfit(plain, kind, name)
    if not str(cfg.get("weights", "weights")).strip():  # ${weights}/x would be /x
        raise ConfigError("weights is empty; give a folder, or unset DIROTQ_WEIGHTS")


def _refuse_unknown(cfg: DictConfig, module: str) -> None:
    """Refuse settings at the root that nothing reads: ``+`` appends anything, as do files."""
    known = _roots(module)
    for key in cfg:
        if str(key) not in known:
            raise no_such_setting("", str(key), known)


def _primary(module: str) -> Any:
    return OmegaConf.load(str(files(module).joinpath("config.yaml")))


def _roots(module: str) -> list[str]:
    """List what the tree's config.yaml holds: settings, and the groups in its list of defaults."""
    tree = _primary(module)
    groups = [str(name) for entry in tree.defaults if OmegaConf.is_config(entry) for name in entry]
    names = [*(str(key) for key in tree if key not in ("defaults", "hydra")), *groups]
    return [name for name in names if "/" not in name]


def _appends(word: str) -> bool:
    """Tell whether a word appends a single setting; groups are Hydra's to know."""
    mark, key, _ = setting(word)
    return mark in ("+", "++") and "." in key and not {"@", "/"} & set(key)


def _refuse_appended(cfg: DictConfig, plain: DictConfig, key: str) -> None:
    """Refuse what was appended to anything but a mapping that a class takes (model.call).

    plain  the configuration without what was appended
    """
    parts = key.split(".")
    if parts[0] == "pipeline":  # its stages are held by `build`
        return
    if parts[:2] in (["hydra", "launcher"], ["hydra", "sweeper"]):  # plugins', which they check
        return
    if parts[0] == "hydra":
        cfg = plain = OmegaConf.create({"hydra": OmegaConf.structured(HydraConf)})
    node: Any = cfg
    there: Any = plain
    of_class = False
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if isinstance(node, DictConfig) and TARGET in node:
            fields = fields_of(node, above)
            if fields is None:
                return
            if part not in fields:
                raise no_such_setting(above, part, fields, moved(node, above, part))
            of_class = True
        elif of_class or not depth:
            pass
        elif not isinstance(there, DictConfig):
            raise ConfigError(f"{key}: there is no such setting; {above} is a value without parts")
        elif part not in there and len(there):  # an empty one takes any name (hydra.job.env_set)
            raise no_such_setting(above, part, map(str, there))
        node = node.get(part) if isinstance(node, DictConfig) else None
        there = there.get(part) if isinstance(there, DictConfig) else None
