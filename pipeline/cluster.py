"""What executors on other machines have in common: what each worker is given, and where it runs."""

from importlib.metadata import PackageNotFoundError, version

from dirotq.errors import ConfigError
from dirotq.pipeline import machine

NO_START = (
    "workers end while they start: DiRotQ and the libraries that it uses have to be installed on "
    "every node, and the store, the model and the prompts to be there, under the same paths"
)


def refuse_counts(workers: int, cpus: int, gpus: int) -> None:
    """Raise ConfigError for no workers, no cores, or more GPUs than a worker uses."""
    for name, value in (("workers", workers), ("cpus", cpus)):
        if value < 1:
            raise ConfigError(f"executor.{name}={value}: use at least 1")
    if gpus not in (0, 1):
        raise ConfigError(
            f"executor.gpus={gpus}: a worker computes on one GPU (1) or on its cores (0); for more "
            "GPUs use more executor.workers"
        )


def refuse_device(gpus: int, device: str, setting: str) -> None:
    """Raise ConfigError where this process and its workers would compute on different things."""
    if gpus and device not in ("auto", "cuda"):
        raise ConfigError(
            f"{setting}={device} and executor.gpus={gpus} both say where to compute: leave one of "
            "them out"
        )
    if not gpus and machine.find(device).gpu:
        raise ConfigError(
            f"{setting}={device} is a GPU here, and executor.gpus=0 gives none to the workers: add "
            "executor.gpus=1, or device=cpu"
        )


def refuse_missing(package: str, executor: str) -> None:
    """Raise ConfigError if the library of an executor isn't installed."""
    try:
        version(package)  # a folder of that name can be imported, too
    except PackageNotFoundError:
        raise ConfigError(
            f"executor={executor} needs {package}, which is not installed: pip install "
            f"'dirotq[{executor}]', on every node. On this machine alone, executor.workers=N goes "
            "without"
        ) from None
