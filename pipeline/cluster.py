"""What executors on other machines have in common: what each worker is given, and where it runs."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from dirotq.errors import ConfigError
from dirotq.pipeline import machine
from dirotq.pipeline.crew import Crew
from dirotq.pipeline.executor import RunStage, run_shared
from dirotq.pipeline.workplace import Workplace

NO_START = (
    "workers end while they start: DiRotQ and the libraries that it uses have to be installed on "
    "every node, and the store, the model and the prompts to be there, under the same paths"
)


@dataclass(frozen=True, kw_only=True)
class ClusterExecutor(ABC):
    """Has the units of divided stages made on other machines.

    workers  at the same time, each with ``cpus`` cores and ``gpus`` GPUs

    Raises ConfigError for no workers, no cores, or more GPUs than a worker uses.
    """

    workers: int
    cpus: int
    gpus: int

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("cpus", self.cpus)):
            if value < 1:
                raise ConfigError(f"executor.{name}={value}: use at least 1")
        if self.gpus not in (0, 1):
            raise ConfigError(
                f"executor.gpus={self.gpus}: a worker computes on one GPU (1) or on its cores (0); "
                "for more GPUs use more executor.workers"
            )

    @property
    def processes(self) -> int:
        """Workers, beside this process."""
        return self.workers

    def refuse(self, device: str, setting: str) -> None:
        """Raise ConfigError where this process and its workers would compute on other things."""
        if self.gpus and device not in ("auto", "cuda"):
            raise ConfigError(
                f"{setting}={device} and executor.gpus={self.gpus} both say where to compute: "
                "leave one of them out"
            )
        if not self.gpus and machine.find(device).gpu:
            raise ConfigError(
                f"{setting}={device} is a GPU here, and executor.gpus=0 gives none to the workers: "
                "add executor.gpus=1, or device=cpu"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[RunStage]:
        """Yield what runs a stage. No worker is started before a stage has units for it.

        Raises ConfigError without what the cluster is reached by.
        """
        with Crew(self.workplace()) as crew:
            yield partial(run_shared, crew, None)

    @abstractmethod
    def workplace(self) -> Workplace:
        """Return where units are made; raises ConfigError where nothing of the kind is here."""


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
