"""Settings that a run would never read: they are refused, so that nobody takes them for heard."""

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dirotq.errors import ConfigError
from dirotq.pipeline import dag
from dirotq.pipeline.quoting import setting
from dirotq.pipeline.settings import TARGET

SHARED = ("prompts.calibration", "prompts.heldout", "branch", "rubric")
"""Parts of the configuration that stages share, and that some pipelines have no use for."""
READ_BY_CHOICE = {
    "gptq.damping": ("method.rounding", "gptq"),
    "basis.regularization": ("basis.branch", "weighted"),
    "basis.alpha": ("basis.smoothing", "fixed"),
    "basis.candidates": ("basis.smoothing", "grid"),
}
"""{setting: (another one, the value of it with which a stage reads the first)}."""
GROUPS = {"metrics": "validate"}
"""{group: the stage whose settings its choices are}."""
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def refuse_idle(cfg: DictConfig, words: Sequence[str], module: str) -> None:
    """Refuse settings of stages that the pipeline leaves out, and of parts that no stage reads
    which runs (calibration prompts without calibration, a branch of a method that has none), and of
    what another setting turns off (GPTQ's damping with nearest rounding): they would change
    nothing.

    A preset may stop early. Where the user does (``until``), what later stages read may stand
    there: the next command runs them.
    """
    if not OmegaConf.is_dict(cfg.get("pipeline")):
        return
    names = [setting(word)[1] for word in words]
    wiring: Any = OmegaConf.to_container(cfg.pipeline, resolve=False)
    chosen = [w for w, name in zip(words, names, strict=True) if name in ("preset", "pipeline")]
    until = None if "until" in names else cfg.get("until")
    running = list(dag.order(wiring, until if until in wiring else None))
    read = _read_by(cfg, running)
    by = chosen[-1] if chosen else "this pipeline"
    for word, name in zip(words, names, strict=True):
        _refuse_turned_off(cfg, word, name)
        stage = re.split(r"[.@]", name)[0]
        stage = GROUPS.get(stage, stage)
        if stage in wiring and stage not in running:
            raise ConfigError(
                f"{word} says something of the stage {stage}, before which {by} stops (it runs "
                f"{', '.join(running)}). Leave one of the two out, or add until={stage}"
            )
        node: Any = None if stage in {*wiring, *read} else _node(cfg, stage)
        if OmegaConf.is_dict(node) and ".stages." in str(node.get(TARGET)):
            others = [f"pipeline={other}" for other in _pipelines_with(stage, module)]
            hint = f", or choose {' or '.join(others)}" if others and not chosen else ""
            raise ConfigError(
                f"{word} says something of the stage {stage}, which {by} leaves out (it "
                f"runs {', '.join(wiring)}). Leave {'one of the two' if chosen else 'it'} out{hint}"
            )
        part = next((p for p in SHARED if name == p or name.startswith(f"{p}.")), None)
        if part is None or part in read:
            continue
        why = f"method={cfg.method.name}" if part == "branch" and not chosen else by
        raise ConfigError(
            f"{word} says something of {part}, which no stage reads with {why} (it "
            f"runs {', '.join(running)}). Leave {'one of the two' if chosen else 'it'} out"
        )


def _refuse_turned_off(cfg: DictConfig, word: str, name: str) -> None:
    """Refuse a setting that is read with another value of a second one alone."""
    if name not in READ_BY_CHOICE or _node(cfg, name) is None:
        return
    other, wanted = READ_BY_CHOICE[name]
    if (found := _node(cfg, other)) != wanted:
        raise ConfigError(
            f"{word} is read with {other}={wanted} alone, and here {other} is {found}. Leave it "
            f"out, or choose {other}={wanted}"
        )


def _node(cfg: DictConfig, path: str) -> Any:
    """Return what stands at a path; None where nothing does, or an interpolation leads nowhere."""
    return OmegaConf.select(cfg, path, throw_on_resolution_failure=False)


def _pipelines_with(stage: str, module: str) -> list[str]:
    """Name the choices of conf/pipeline that run a stage."""
    found = files(module).joinpath("pipeline").iterdir()
    trees = {file.name.removesuffix(".yaml"): OmegaConf.load(str(file)) for file in found}
    return sorted(name for name, tree in trees.items() if stage in tree)


def _read_by(cfg: DictConfig, stages: Sequence[str]) -> set[str]:
    """Return the paths that the settings of ``stages`` refer to, and what those refer to."""
    found: set[str] = set()
    waiting = list(stages)
    while waiting:
        node = _node(cfg, waiting.pop())
        if not OmegaConf.is_config(node):
            continue
        plain: Any = OmegaConf.to_container(node, resolve=False)
        new = set(_REFERENCE.findall(str(plain))) - found
        found |= new
        waiting += new
    return found
