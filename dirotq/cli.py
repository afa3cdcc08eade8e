"""``dirotq <verb> ...``: verbs and Hydra. Errors leave through pipeline/faults.py.

Exit status: 0 done; 2 something the user can mend, told in one paragraph on stderr; 1 a fault of
ours or of a library, told likewise. ``--debug``, DIROTQ_DEBUG=1 or HYDRA_FULL_ERROR=1 add the
traceback.
"""

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dirotq import doctor, generate
from dirotq.errors import ConfigError
from dirotq.pipeline import dag, explain, housekeeping, preflight, report, runs
from dirotq.pipeline.config import Line, build, compose_config, search_path, with_model_folder
from dirotq.pipeline.faults import explained
from dirotq.pipeline.quoting import is_multirun
from dirotq.pipeline.secrecy import refuse_secrets
from dirotq.pipeline.store import Artifact
from dirotq.pipeline.sweeps import variants

__all__ = ["compress", "main"]

log = logging.getLogger(__name__)

CONFIG = "dirotq.conf"  # the package of the config tree

USAGE = """\
usage: dirotq <verb> [...]

  compress [OVERRIDES] [-m]   run the line: capture to pack, reference images, validate
  plan     [OVERRIDES]        what is cached, what would run, what it takes, whether it fits
  explain  [OVERRIDES]        why each stage would run; `explain A B` compares two artifacts
  verify   [ARTIFACTS]        hold artifacts against their digests; --remove damaged ones
  gc       [--keep N] [--yes] what nothing needs any more; --yes removes it
  generate MODEL --prompt ... one image from a packed model
  doctor                      what this machine has and what would run on it

--debug, with any verb, shows the traceback of an error. --version

OVERRIDES are Hydra's: model=tiny_flux (or a diffusers folder), rank.r=32, until=gptq,
force=[rank], store=FOLDER. `dirotq compress --help` lists the groups; -m sweeps over commas.
"""


def main(argv: Sequence[str] | None = None, *, config: str = CONFIG) -> None:
    """Entry point of the console script. Always leaves through SystemExit."""
    # Calls that wait between blocks change their tensors' sizes on the way: without this, torch
    # holds on to the memory of both. Read when CUDA is first used.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or any(
        os.environ.get(name) == "1" for name in ("DIROTQ_DEBUG", "HYDRA_FULL_ERROR")
    )
    logging.raiseExceptions = debug  # a log file that can't be written is no reason for tracebacks
    _print_anything()
    try:
        Path.cwd()  # said here: some libraries end the process where that is gone
        verb, *rest = [word for word in words if word != "--debug"] or ["--help"]
        status = _dispatch(verb, rest, config)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where an error can still be told
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the boundary: nothing but SystemExit leaves
        message, status = explained(error)
        with suppress(OSError, ValueError):  # nobody may be listening any more
            if debug:
                traceback.print_exception(error)
            print(f"dirotq: {message}", file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            _discard_output()
    sys.exit(status)


def compress(*overrides: str) -> dict[str, Artifact]:
    """Run the line from Python: ``compress("model=tiny_flux", "rank.r=32")["pack"].path``.

    returns {stage: artifact}. Raises DirotqError.
    """
    cfg = compose_config(overrides, CONFIG)
    line = build(cfg)
    folder = runs.new_folder(line.store)
    folder.mkdir(parents=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    outcomes = _run(line, cfg, folder, overrides)
    return {name: outcome.artifact for name, outcome in outcomes.items()}


def _dispatch(verb: str, rest: list[str], config: str) -> int:
    with_config: dict[str, Callable[[list[str], str], int]] = {
        "compress": _compress,
        "plan": _plan,
        "explain": explain.command,
    }
    plain: dict[str, Callable[[list[str]], int]] = {
        "verify": housekeeping.verify,
        "gc": housekeeping.gc,
        "generate": generate.command,
        "doctor": doctor.command,
    }
    shown = _without_prompt(rest) if verb == "generate" else rest
    refuse_secrets([verb, *shown])  # before anything prints or writes them
    if verb in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if verb in ("-V", "--version", "version") or "--version" in rest:
        print(f"dirotq {metadata.version('dirotq')}")
        return 0
    if verb in with_config:
        if verb != "compress" and {"-h", "--help"} & set(rest):
            print(USAGE, end="")
            return 0
        return with_config[verb](rest, config)
    if verb in plain:
        return plain[verb](rest)
    verbs = [*with_config, *plain]
    close = difflib.get_close_matches(verb, verbs, n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    raise ConfigError(f"unknown verb {verb!r}; the verbs are {', '.join(verbs)}.{hint}")


def _compress(args: list[str], config: str) -> int:
    if is_multirun(args):  # Hydra wants it before or after all overrides
        args = ["--multirun", *(arg for arg in args if not is_multirun([arg]))]
    parser = get_args_parser()
    parser.prog = "dirotq compress"
    options = parser.parse_args(args)
    _try_out(options, config)
    hydra_main = hydra.main(version_base="1.3", config_path=f"pkg://{config}", config_name="config")
    with _hydra_process(with_model_folder(args, config)):
        hydra_main(_job)()
    return 0


def _try_out(options: Any, config: str) -> None:
    """Build the line, of a sweep each value's, before Hydra puts a folder into the store.

    Where Hydra will only print something, the configuration alone has to be right.
    """
    if options.config_name or options.config_path:
        raise ConfigError(
            "--config-name and --config-path are not for this command: its settings are conf/config"
            ".yaml's. Files of your own: --config-dir FOLDER adds a folder with groups such as "
            "experiment/mine.yaml"
        )
    added = [search_path(config, options.config_dir)] if options.config_dir else []
    prints = any((options.help, options.hydra_help, options.info, options.cfg))
    for overrides in variants(options.overrides, sweep=options.multirun):
        cfg = compose_config([*added, *overrides], config)
        if not prints:
            build(cfg)


def _job(cfg: DictConfig) -> None:
    """One run under Hydra; at module level because launchers send it to other processes."""
    line = build(cfg)
    context = HydraConfig.get()
    folder = Path(context.runtime.output_dir).absolute()
    # As typed: what an interpolation takes from the environment stays there.
    overrides: Any = OmegaConf.to_container(context.overrides.task, resolve=False)
    outcomes = _run(line, cfg, folder, overrides)
    report.summary(outcomes, folder)


def _run(
    line: Line, cfg: DictConfig, folder: Path, overrides: Sequence[str]
) -> dict[str, dag.Outcome]:
    found = preflight.examine(line, cfg)
    preflight.refuse(found, line.store.root)
    runs.record(folder, line.store, {step.name: str(step) for step in line.steps})
    return dag.run(
        line.steps,
        line.store,
        line.executor,
        force=line.force,
        overrides=list(overrides),
        estimates=found.records,
    )


def _plan(args: list[str], config: str) -> int:
    cfg = compose_config(args, config)
    line = build(cfg)
    found = preflight.examine(line, cfg)
    report.plan(line, found)
    preflight.refuse(found, line.store.root)
    return 0


@contextmanager
def _hydra_process(args: list[str]) -> Iterator[None]:
    """Let Hydra read ``args`` as its command line, and raise errors instead of printing them."""
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["dirotq compress", *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def _without_prompt(words: Sequence[str]) -> list[str]:
    """A prompt may say what it likes."""
    before = ["", *words]
    return [
        word
        for last, word in zip(before, words)
        if last != "--prompt" and not word.startswith("--prompt=")
    ]


def _print_anything() -> None:
    """Let a terminal or file whose encoding lacks a letter show it escaped, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Keep the interpreter from complaining about the broken pipe once more when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
