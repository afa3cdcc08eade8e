"""Units made by SLURM jobs: submitit submits one array per stage, and what is lost once more.

A job makes its whole share. SLURM says where and when it runs; what it makes goes through the
store.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.pipeline.cluster import NO_START, ClusterExecutor, refuse_missing
from dirotq.pipeline.desk import Desk
from dirotq.pipeline.job import Job, Seen, answer, threads
from dirotq.pipeline.machine import Needs
from dirotq.pipeline.worker import environ
from dirotq.pipeline.workplace import LATE, LostError, Share, settle, shared_desk

log = logging.getLogger(__name__)

LOOK = 0.5
"""Seconds between two looks for results; submitit asks SLURM itself once a minute."""
ENDS = 30.0
"""Seconds in which a cancelled job is gone."""


@dataclass(frozen=True, kw_only=True)
class SlurmExecutor(ClusterExecutor):
    """Has the units of divided stages made by jobs.

    workers  jobs at the same time, each with ``cpus`` cores, ``gpus`` GPUs and ``minutes``
    cluster  ``local``: submitit's jobs as processes of this machine, to try it without SLURM
    options  more of submitit's settings: {slurm_partition: gpu, mem_gb: 64}

    Raises ConfigError for counts that can't be.
    """

    minutes: int
    cluster: Literal["slurm", "local"]
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minutes < 1:
            raise ConfigError(f"executor.minutes={self.minutes}: use at least 1")

    def together(self, stage: Any, needs: Needs) -> Needs:
        """Return what a stage needs of this machine. Of other machines nothing is known here."""
        return needs

    def helping(self, left: int, idle: int) -> int:
        """Count the units of one job: an equal share, for a job takes long to start."""
        return -(-left // idle)

    def workplace(self) -> "Jobs":
        """Return the jobs of one run; raises ConfigError without submitit or SLURM."""
        refuse_missing("submitit", "slurm")
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError(
                "executor=slurm: there is no SLURM here (no `sbatch`). Start this where jobs are "
                "submitted; or use the processes of this machine: executor=local "
                f"executor.workers={self.workers}"
            )
        return Jobs(self)


class Jobs:
    """The jobs of one run."""

    no_start = NO_START
    patience = LATE
    together = False

    def __init__(self, settings: SlurmExecutor) -> None:
        self._settings = settings
        self._desk: Desk | None = None
        self._submits: Any = None
        self.workers: Sequence[Slot] = [Slot(self) for _ in range(settings.workers)]

    @property
    def begun(self) -> bool:
        """Whether any job of this stage got as far as its units."""
        return self._desk is not None and any(self._desk.folder.glob("*.log"))

    def send(self, job: Job, shares: Sequence[Share]) -> list[Future[Seen]]:
        """Submit one job for each share, together; a future raises BrokenExecutor if it dies.

        Raises UnsupportedError if they can't be submitted.
        """
        if not shares:
            return []
        names = [list(share) for _, share in shares]
        try:
            with environ(threads(self._settings.cpus)):
                jobs = self._submits.map_array(answer, [job] * len(names), names)
        except Exception as error:  # submitit's, and of `sbatch`
            raise UnsupportedError(
                f"jobs can't be submitted: {' '.join(str(error).split())[-300:]}. executor.options "
                "holds what else SLURM wants: executor.options={slurm_partition: NAME}"
            ) from error
        log.info("%d jobs submitted, from %s on", len(jobs), jobs[0].job_id)
        slots = [cast(Slot, worker) for worker, _ in shares]
        return [slot.took(made) for slot, made in zip(slots, jobs, strict=True)]

    def helping(self, left: int, idle: int) -> int:
        return self._settings.helping(left, idle)

    def device(self, asked: str) -> str:
        return "cuda" if self._settings.gpus else "cpu"

    @contextlib.contextmanager
    def desk(self, out: Path) -> Iterator[Desk]:
        """Open a desk, and look for results until the block ends."""
        over = threading.Event()
        looking = threading.Thread(target=self._look, args=(over,), daemon=True)
        with shared_desk(out) as desk:
            self._desk, self._submits = desk, self._submitter(desk.folder / "jobs")
            looking.start()
            try:
                yield desk
            finally:
                over.set()
                looking.join()

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _look(self, over: threading.Event) -> None:
        while not over.wait(LOOK):
            for worker in self.workers:
                worker.look()

    def _submitter(self, folder: Path) -> Any:
        import submitit

        given = self._settings
        made = submitit.AutoExecutor(folder=folder, cluster=given.cluster)
        wanted = {
            "name": "dirotq", "timeout_min": given.minutes, "cpus_per_task": given.cpus,
            "slurm_array_parallelism": given.workers,
            "slurm_setup": [f"export {n}={value}" for n, value in threads(given.cpus).items()],
        }  # fmt: skip
        if given.gpus:
            wanted["gpus_per_node"] = given.gpus
        try:
            made.update_parameters(**wanted | dict(given.options))
        except (NameError, TypeError, ValueError) as error:
            raise ConfigError(f"executor.options: submitit refuses them: {error}") from error
        return made


class Slot:
    """One job at a time."""

    def __init__(self, owner: Jobs) -> None:
        self._owner = owner
        self._job: Any = None
        self._future: Future[Seen] | None = None
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def started(self) -> bool:
        """Whether a job of this stage got as far as its units."""
        return self._owner.begun

    def start(self) -> None:
        """Do nothing: a job starts with what it is to do."""

    def took(self, job: Any) -> Future[Seen]:
        """Wait for a job that was submitted."""
        future: Future[Seen] = Future()
        with self._lock:
            self._job, self._future = job, future
        return future

    def look(self) -> None:
        """Settle the future if the job ended."""
        with self._lock:
            if self._job is None or self._future is None or not self._job.done():
                return
            job, future, self._job, self._future = self._job, self._future, None, None
        self._peaks = settle(future, job.result)

    def rest(self) -> Future[dict[str, int]]:
        """Tell what memory the last job took."""
        future: Future[dict[str, int]] = Future()
        if self._peaks:
            future.set_result(self._peaks)
        else:
            future.set_exception(LostError("it did nothing"))
        self._peaks = {}
        return future

    def stop(self) -> None:
        """Cancel the job if it runs, and wait for its end."""
        with self._lock:
            job, self._job, self._future = self._job, None, None
        if job is None:
            return
        with contextlib.suppress(Exception):  # it may have ended; the desk ends it in any case
            job.cancel(check=False)
        end = time.monotonic() + ENDS
        while not job.done(force_check=True) and time.monotonic() < end:
            time.sleep(LOOK)
