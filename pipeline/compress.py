"""``dirotq compress`` and ``dirotq plan``: run the pipeline under Hydra, or say what would run."""

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirotq.errors import ConfigError
from dirotq.pipeline import config, dag, early, forecast, preflight, report, runs
from dirotq.pipeline.build import Pipeline, build
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.importing import imported, no_collecting
from dirotq.pipeline.quoting import parsed, quoted
from dirotq.pipeline.settings import close_to, make
from dirotq.pipeline.sharing import pushed_too
from dirotq.pipeline.store import Artifact
from dirotq.progress import begin

log = logging.getLogger(__name__)

CONFIG = "dirotq.conf"  # the package of the config tree


def add_compress(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `compress`. All its options but -m and --help are Hydra's."""
    parser = add(
        _compress, "run the pipeline: capture to pack, reference images, validate",
        "                           the small model that comes along, in seconds",
        "model=flux rank.r=32       a choice of conf/model, another rank",
        "model=FOLDER until=gptq    a diffusers folder; stop after a stage",
        "model=FOLDER preset=instant  no calibration: a minute or a few",
        "--cfg job                  print all settings, and run nothing",
        "-m rank.r=8,16,32          once per value; also several at a time:",
        "-m rank.r=8,16,32 hydra/launcher=joblib           (pip install 'dirotq[sweep]')",
        "-m rank.r=8,16,32 hydra/launcher=submitit_slurm   (pip install 'dirotq[slurm]')",
        "-m experiment=search       few bits and a high PSNR, by Optuna ('dirotq[search]')",
        usage="dirotq compress [OVERRIDES ...] [-m] [options]", add_help=False,
    )  # fmt: skip
    add_overrides(parser)
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the groups")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-m", "--multirun", action="store_true", help="sweep over commas in values")
    what.add_argument("-r", "--run", action="store_true", help="run once, as without this")
    what.add_argument("-c", "--cfg", choices=("job", "hydra", "all"), help="print the settings")
    what.add_argument(
        "-i", "--info", nargs="?", const="all", metavar="WHAT",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        help="print how the settings come about: %(choices)s",
    )  # fmt: skip
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="at the end, every metric of each stage"
    )
    parser.add_argument("--resolve", action="store_true", help="with --cfg: values of ${...}")
    parser.add_argument("-p", "--package", help="with --cfg: of this part only")
    parser.add_argument("-cd", "--config-dir", metavar="FOLDER", help="has groups of your own")
    parser.add_argument("--hydra-help", action="store_true", help="show Hydra's help")
    parser.add_argument("-cn", "--config-name", help=argparse.SUPPRESS)  # refused with a reason
    parser.add_argument("-cp", "--config-path", help=argparse.SUPPRESS)
    parser.set_defaults(parser=parser, shell_completion=False)


def add_plan(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `plan`."""
    what = "what is cached, what would run, what it takes, whether it fits"
    add_overrides(add(_plan, what, "model=flux rank.r=32", "model=FOLDER"))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the OVERRIDES that `compress`, `plan` and `explain` share."""
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDES",
        help="settings: model=tiny_flux (or a diffusers folder, a .safetensors file, a hub id), "
        "rank.r=32, until=gptq, force=[rank], store=FOLDER; `dirotq compress --help` lists the "
        "groups, `dirotq compress --cfg job` all settings",
    )  # fmt: skip


def run(overrides: Sequence[str]) -> dict[str, Artifact]:
    """Run the pipeline without Hydra's command line; {stage: artifact}. Raises DirotqError."""
    cfg = compose_config(overrides, CONFIG)
    with early.block():
        start_workers(cfg)
        pipeline = build(cfg)
        folder = runs.new_folder(pipeline.store)
        folder.mkdir(parents=True)
        OmegaConf.save(cfg, folder / "config.yaml")
        outcomes = _run(pipeline, cfg, folder, overrides)
    return {name: outcome.artifact for name, outcome in outcomes.items()}


def start_workers(cfg: DictConfig) -> None:
    """Begin to start the processes that the settings ask for, in an ``early.block``.

    What is wrong with the settings is left to ``build``.
    """
    with contextlib.suppress(ConfigError, HydraException, OmegaConfBaseException):
        executor = make(cfg.executor, "executor")
        if isinstance(executor, LocalExecutor):
            executor.start_early()


def _compress(options: argparse.Namespace) -> int:
    """Run the stages and print where the packed model is.

    What the store holds already is not made again.
    """
    if options.help:
        options.parser.print_help()
        print("\ngroups (GROUP=CHOICE):")
        for name, choices in config.groups(options.config).items():
            print(f"  {name}: {', '.join(choices)}")
        return 0
    if options.resolve and not options.cfg:
        options.parser.error("--resolve goes with --cfg only")
    if options.verbose:  # a setting, because launchers send it to other processes
        options.overrides = [*options.overrides, "verbose=true"]
    if not (options.cfg or options.info or options.hydra_help):
        begin("reading the settings and the model")
    with early.block():
        _try_out(options)
        options.overrides = config.with_model_folder(
            options.overrides, options.config, sweep=options.multirun
        )
        _under_hydra(options)
    return 0


def _under_hydra(options: argparse.Namespace) -> None:
    """Have Hydra compose the settings and call :func:`_job`, or do what its options say."""
    version.setbase("1.3")
    full = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    try:
        _run_hydra(
            args=options,
            args_parser=get_args_parser(),
            task_function=_job,
            config_path=f"pkg://{options.config}",
            config_name="config",
        )
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def _try_out(options: argparse.Namespace) -> None:
    """Build the pipeline, of a sweep each value's, before Hydra puts a folder into the store.

    Where Hydra will only print something, the configuration alone has to be right.
    """
    if options.config_name or options.config_path:
        raise ConfigError(
            "--config-name and --config-path are not for this command: its settings are conf/config"
            ".yaml's. Files of your own: --config-dir FOLDER adds a folder with groups such as "
            "experiment/mine.yaml"
        )
    added = [config.search_path(options.config, options.config_dir)] if options.config_dir else []
    prints = any((options.hydra_help, options.info, options.cfg))
    typed = options.overrides
    for overrides in _each_value(typed) if options.multirun else [typed]:
        cfg = compose_config([*added, *overrides], options.config)
        if not prints:
            if not options.multirun:  # a launcher may run jobs elsewhere
                start_workers(cfg)
            with no_collecting():
                build(cfg)
                imported()


def _each_value(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield overrides without sweeps: the first values together, then every other one in its place.

    Wrong values show without the whole product. What can't be parsed or counted stays as it is.
    """
    choices = [_values(word) for word in overrides]
    first = [values[0] for values in choices]
    yield first
    for place, values in enumerate(choices):
        for value in values[1:]:
            yield [*first[:place], value, *first[place + 1 :]]


def _values(override: str) -> list[str]:
    """Return an override with each value of its sweep."""
    if override.startswith("model="):  # names or one path, which pipeline/config.py tells apart
        names = override.partition("=")[2]
        whole = "," not in names or os.path.lexists(names)
        return [override] if whole else [f"model={name}" for name in names.split(",")]
    word = quoted(override, sweep=True)
    found = parsed(word)
    if found is None or not found.is_sweep_override() or not found.is_discrete_sweep():
        return [word]
    name = found.get_key_element()
    return [f"{name}={value}" for value in found.sweep_string_iterator()] or [word]


def _job(cfg: DictConfig) -> list[float] | None:
    """Run once under Hydra; at module level because launchers send it to other processes.

    Returns what a search asked for (``objectives``), if anything.
    """
    pipeline = build(cfg)
    context = HydraConfig.get()
    folder = Path(context.runtime.output_dir).absolute()
    # As typed: what an interpolation takes from the environment stays there.
    overrides: Any = OmegaConf.to_container(context.overrides.task, resolve=False)
    outcomes = _run(pipeline, cfg, folder, overrides)
    report.summary(outcomes, folder, verbose=bool(cfg.get("verbose")))
    for step in pipeline.steps:
        if callable(advice := getattr(step.stage, "advice", None)):
            print(advice())
    return _objectives(outcomes, list(cfg.get("objectives") or ()))


def _objectives(outcomes: Mapping[str, dag.Outcome], names: Sequence[str]) -> list[float] | None:
    """Return the named metrics. Raises ConfigError for one that no stage has."""
    metrics: dict[str, float] = {}
    for outcome in outcomes.values():
        metrics |= outcome.artifact.metrics
    for name in names:
        if name not in metrics:
            raise ConfigError(
                f"objectives: this run has no metric {name!r};{close_to(name, metrics)} it has "
                f"{', '.join(sorted(metrics))}"
            )
    return [metrics[name] for name in names] or None


def _run(
    pipeline: Pipeline, cfg: DictConfig, folder: Path, overrides: Sequence[str]
) -> dict[str, dag.Outcome]:
    found = preflight.examine(pipeline, cfg)
    preflight.refuse(found, pipeline.store.root)
    log.info("%s", report.outlook(pipeline, found))
    for advice in found.work[1:]:
        log.warning("%s", advice)
    runs.record(folder, pipeline.store, {step.name: str(step) for step in pipeline.steps})
    with pushed_too(pipeline.store.remote if pipeline.push else None) as push:
        return dag.run(
            pipeline.steps, pipeline.store, pipeline.executor, force=pipeline.force,
            overrides=list(overrides), estimates=found.records, finished=push,
        )  # fmt: skip


def _plan(options: argparse.Namespace) -> int:
    """Show what `dirotq compress` with these settings would do, and whether it fits this machine.

    Nothing is written. A `~` stands before an estimate.
    """
    begin("reading the settings and the model")
    cfg = compose_config(options.overrides, options.config)
    with no_collecting():
        pipeline = build(cfg)
        imported()
    found = preflight.examine(pipeline, cfg)
    report.plan(pipeline, found)
    forecast.show(pipeline, found)
    preflight.refuse(found, pipeline.store.root)
    return 0
