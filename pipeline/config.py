"""From overrides to a line that can be planned or run. Nothing behind it sees a DictConfig."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dirotq.errors import ConfigError, DirotqError
from dirotq.pipeline import dag
from dirotq.pipeline.store import ArtifactStore

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@\s,]+)?")

__all__ = ["Line", "build", "compose_config", "with_model_folder"]


@dataclass(frozen=True, slots=True)
class Line:
    """Everything a configuration says, built."""

    steps: list[dag.Step]
    store: ArtifactStore
    executor: Executor
    force: frozenset[str]


def build(cfg: DictConfig) -> Line:
    """Instantiate the stages that ``cfg.pipeline`` wires, up to ``cfg.until``.

    Raises ConfigError for a wrong wiring, an unknown name in ``until`` or ``force``, or whatever a
    stage's own checks refuse.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"{key} has no value; set it with {key}=...")
    wiring: Any = OmegaConf.to_container(cfg.pipeline, resolve=True)
    force = [cfg.force] if isinstance(cfg.force, str) else list(cfg.force)
    for name in wiring:
        if name not in cfg:
            raise ConfigError(f"conf/pipeline names the stage {name!r}, which has no configuration")
    for name in force:
        if name not in wiring:
            raise ConfigError(f"force={name}: no such stage; this pipeline has {', '.join(wiring)}")
    stages = {name: _instantiate(cfg[name]) for name in dag.order(wiring, cfg.until)}
    for stage in stages.values():
        if callable(check := getattr(stage, "check", None)):
            check()
    return Line(
        steps=dag.plan(stages, wiring),
        store=ArtifactStore(cfg.store),
        executor=_instantiate(cfg.executor),
        force=frozenset(force),
    )


def compose_config(overrides: Sequence[str], module: str) -> DictConfig:
    """The configuration that ``overrides`` make of the config tree in the package ``module``."""
    with _hydra(module):
        return compose("config", overrides=with_model_folder(overrides, module))


def with_model_folder(overrides: Sequence[str], module: str) -> list[str]:
    """``model=<folder>`` becomes ``model=local model.path=<folder>``; the rest stays as it is.

    So do a file and a hub id (``org/name[@revision]``). A config name wins over a folder of the
    same name, and a folder over a hub id. Raises ConfigError if the value is nothing of these.
    """
    result = []
    for override in overrides:
        group, _, value = override.partition("=")
        if group != "model" or not value:
            result.append(override)
            continue
        with _hydra(module):
            known = GlobalHydra.instance().config_loader().get_group_options("model")
        if set(value.split(",")) <= set(known):  # a comma: a sweep over several models
            result.append(override)
        elif (path := _model_path(value)) is not None:
            quoted = path.replace("\\", "\\\\").replace("'", "\\'")
            result += ["model=local", f"model.path='{quoted}'"]
        else:
            raise ConfigError(
                f"model={value}: no such model. Known models are {', '.join(known)}; the path of "
                "an existing diffusers folder or .safetensors file works too, and so does the hub "
                "id of a diffusers pipeline (org/name, org/name@revision)"
            )
    return result


def _model_path(value: str) -> str | None:
    """An existing folder or file, absolute; a hub id as it is; else None."""
    local = Path(value).expanduser()
    if local.exists() or local.suffix == ".safetensors":  # a missing file has a message of its own
        return str(local.absolute())
    return value if HUB_ID.fullmatch(value) else None


@contextmanager
def _hydra(module: str) -> Iterator[None]:
    """Hydra's compose API on ``module``, unless Hydra is running already."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with initialize_config_module(module, version_base="1.3"):
            yield


def _instantiate(node: DictConfig) -> Any:
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DirotqError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
