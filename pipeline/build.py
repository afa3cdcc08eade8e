"""From a configuration to a pipeline that can be planned or run.

Nothing behind it sees a DictConfig.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirotq.errors import ConfigError
from dirotq.pipeline import dag
from dirotq.pipeline.executor import Executor
from dirotq.pipeline.importing import no_collecting
from dirotq.pipeline.machine import refuse_device
from dirotq.pipeline.remote_store import RemoteStore
from dirotq.pipeline.secrecy import refuse_secret_settings
from dirotq.pipeline.settings import make, refuse_misfit
from dirotq.pipeline.store import Artifact, ArtifactStore
from dirotq.pipeline.wording import reworded

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


def _refuse_plain_misfits(cfg: DictConfig) -> None:
    for name, kind in PLAIN.items():
        if name in cfg:
            value = cfg[name]
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            refuse_misfit(plain, kind, name)
    if not str(cfg.get("weights", "weights")).strip():  # ${weights}/x would be /x
        raise ConfigError("weights is empty; give a folder, or unset DIROTQ_WEIGHTS")
