"""``dirotq <verb> ...``: verbs, Hydra, and what becomes of errors.

Exit status: 0 done; 2 something the user can mend (one paragraph on stderr; the traceback too with
DIROTQ_DEBUG=1 or HYDRA_FULL_ERROR=1); 1 a bug of ours, with its traceback.
"""

import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirotq.errors import ConfigError, DirotqError
from dirotq.pipeline import dag, doctor, explain, generate, housekeeping, preflight, report, runs
from dirotq.pipeline.config import Line, build, compose_config, with_model_folder
from dirotq.pipeline.disk import is_disk_full
from dirotq.pipeline.store import Artifact, ArtifactStore, default_root

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

OVERRIDES are Hydra's: model=tiny_flux (or a diffusers folder), rank.r=32, until=gptq,
force=[rank], store=FOLDER. `dirotq compress --help` lists the groups; -m sweeps over commas.
"""


def main(argv: Sequence[str] | None = None, *, config: str = CONFIG) -> None:
    """Entry point of the console script. Always leaves through SystemExit."""
    # Calls that wait between blocks change their tensors' sizes on the way: without this, torch
    # holds on to the memory of both. Read when CUDA is first used.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = any(os.environ.get(name) == "1" for name in ("DIROTQ_DEBUG", "HYDRA_FULL_ERROR"))
    try:
        status = _dispatch(verb, rest, config)
    except BaseException as error:
        if isinstance(error, SystemExit) or (message := _explained(error)) is None:
            raise
        if debug:
            traceback.print_exception(error)
        print(f"dirotq: {message}", file=sys.stderr)
        status = 2
    sys.exit(status)


def compress(*overrides: str) -> dict[str, Artifact]:
    """Run the line from Python: ``compress("model=tiny_flux", "rank.r=32")["pack"].path``.

    returns {stage: artifact}. Raises DirotqError, or what Hydra says about a wrong override.
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
    if verb in ("-h", "--help", "help"):
        print(USAGE, end="")
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
    stores = [arg.partition("=")[2] for arg in args if arg.startswith("store=")]
    ArtifactStore(stores[-1] if stores else default_root())  # before Hydra puts a folder into it
    hydra_main = hydra.main(version_base="1.3", config_path=f"pkg://{config}", config_name="config")
    with _hydra_process(with_model_folder(args, config)):
        hydra_main(_job)()
    return 0


def _job(cfg: DictConfig) -> None:
    """One run under Hydra; at module level because launchers send it to other processes."""
    line = build(cfg)
    context = HydraConfig.get()
    folder = Path(context.runtime.output_dir).absolute()
    outcomes = _run(line, cfg, folder, list(context.overrides.task))
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


def _explained(error: BaseException) -> str | None:
    """One paragraph for an error that the user can mend; None for anything else."""
    if isinstance(error, DirotqError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        # Hydra keeps its best sentence (the suggestion) in the message, the reason in the cause.
        parts = [str(error), str(error.__cause__ or "")]
        return "\n".join(part.strip() for part in dict.fromkeys(parts) if part.strip())
    if isinstance(error, KeyboardInterrupt):
        where = f" in {error.args[0]}" if error.args else ""
        return f"interrupted{where}; finished work is kept; run the same command to resume"
    if is_disk_full(error):
        return f"the disk is full: {error}. Make room, then run the same command to resume"
    if isinstance(error, PermissionError):
        return f"{error}. Choose a writable store with store=FOLDER or DIROTQ_STORE"
    return None
