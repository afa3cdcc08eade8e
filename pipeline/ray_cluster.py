"""Units made by actors of a Ray cluster: one that runs, or one of this machine for this run alone.

Ray says where an actor runs, starts it and notices its end; what it makes goes through the store.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.pipeline.cluster import NO_START, ClusterExecutor, refuse_missing
from dirotq.pipeline.desk import Desk
from dirotq.pipeline.divided import Divided
from dirotq.pipeline.job import Answer, Job, Seen, answer, forget, threads
from dirotq.pipeline.machine import Needs
from dirotq.pipeline.workplace import LATE, LostError, Share, few_at_a_time, settle, shared_desk

log = logging.getLogger(__name__)

ANSWERS = 5.0
"""Seconds in which the head of a cluster takes a connection. Ray itself tries for minutes."""
ENDS = 30.0
"""Seconds in which a killed actor is gone."""
OBJECTS = 100 << 20
"""Bytes of shared memory for a cluster of ours: nothing of size goes through it."""


@dataclass(frozen=True, kw_only=True)
class RayExecutor(ClusterExecutor):
    """Has the units of divided stages made by actors.

    workers  actors, each with ``cpus`` cores and ``gpus`` GPUs
    address  HOST:PORT of a cluster that runs, which this machine is a node of; ``auto``: the one
             that this machine knows of; None: one on this machine, which ends with the run

    Raises ConfigError for counts or an address that can't be.
    """

    address: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        host, _, port = (self.address or "auto").rpartition(":")
        if self.address not in (None, "auto") and not (host and port.isdigit()):
            raise ConfigError(
                f"executor.address={self.address}: use HOST:PORT of the cluster's head, auto, or "
                "null for a cluster of this run's own"
            )

    def together(self, stage: Any, needs: Needs) -> Needs:
        """Return what a stage needs of this machine, which has all actors if the cluster is ours.

        Of other machines nothing is known here.
        """
        if self.address is not None or not isinstance(stage, Divided):
            return needs
        return replace(needs, ram=needs.ram * self.workers)

    def helping(self, left: int, idle: int) -> int:
        """Count the units that one of the actors is given."""
        return few_at_a_time(left, self.workers)

    def workplace(self) -> "Actors":
        """Return the actors of one run; raises ConfigError without Ray."""
        refuse_missing("ray", "ray")
        return Actors(self)


class Actors:
    """The actors of one run."""

    no_start = NO_START
    patience = LATE
    together = False

    def __init__(self, settings: RayExecutor) -> None:
        self._settings = settings
        self._ours = False
        self.workers: Sequence[Actor] = [Actor(self) for _ in range(settings.workers)]

    def send(self, job: Job, shares: Sequence[Share]) -> list[Future[Seen]]:
        """Have units made; a future raises BrokenExecutor if its actor dies."""
        return [cast(Actor, worker).make(job, names) for worker, names in shares]

    def helping(self, left: int, idle: int) -> int:
        return self._settings.helping(left, idle)

    def device(self, asked: str) -> str:
        return "cuda" if self._settings.gpus else "cpu"

    def desk(self, out: Path) -> contextlib.AbstractContextManager[Desk]:
        return shared_desk(out)

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
        if self._ours:
            _ray().shutdown()
            self._ours = False

    def new(self) -> Any:
        """Have an actor started, on a cluster that has room for all.

        Raises UnsupportedError if the cluster does not answer, or is too small.
        """
        ray, given = _ray(), self._settings
        if not ray.is_initialized():  # a script, or a launcher, may have connected
            self._connect(ray)
            self._refuse_small(ray)
        made = ray.remote(
            num_cpus=given.cpus, num_gpus=given.gpus, max_restarts=0, max_task_retries=0
        )
        return made(Maker).remote(threads(given.cpus))

    def _connect(self, ray: Any) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        address = self._settings.address
        self._ours = True  # of an existing cluster, the connection
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            count = self._settings.workers * self._settings.cpus
            ray.init(
                address="local", num_cpus=count, include_dashboard=False,
                object_store_memory=OBJECTS, **quiet,
            )  # fmt: skip
            return
        if address != "auto":
            host, _, port = address.rpartition(":")
            try:
                socket.create_connection((host, int(port)), ANSWERS).close()
            except (OSError, OverflowError) as error:
                raise UnsupportedError(_no_cluster(address, str(error))) from error
        try:
            ray.init(address=address, **quiet)
        except Exception as error:  # whatever Ray says of its connection
            raise UnsupportedError(_no_cluster(address, str(error))) from error

    def _refuse_small(self, ray: Any) -> None:
        given = self._settings
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fits = [
            min(n.get("CPU", 0) // given.cpus, n.get("GPU", 0) if given.gpus else 1e9)
            for n in nodes
        ]
        if sum(fits) < given.workers:
            what = f"{given.cpus} cores" + (" and a GPU" if given.gpus else "")
            raise UnsupportedError(
                f"executor.workers={given.workers} with {what} each: the Ray cluster has "
                f"{len(nodes)} nodes that hold {int(sum(fits))} of them. Use fewer workers "
                "(executor.workers), fewer cores for each (executor.cpus), or a larger cluster"
            )
        if ray.available_resources().get("CPU", 0) < given.workers * given.cpus:
            log.warning("others use the Ray cluster: some workers wait until it has room")


class Actor:
    """One actor, started when it is first needed, and again after :meth:`stop`."""

    def __init__(self, owner: Actors) -> None:
        self._owner = owner
        self._actor: Any = None
        self._pid: Future[int] | None = None

    @property
    def started(self) -> bool:
        """Whether the actor that was started last got as far as doing what it is told."""
        return self._pid is not None and self._pid.done() and self._pid.exception() is None

    def start(self) -> None:
        """Begin to start the actor, unless it runs."""
        if self._actor is None:
            self._actor = self._owner.new()
            self._pid = self._actor.pid.remote().future()

    def make(self, job: Job, names: Sequence[str]) -> Future[Seen]:
        """Have units made; the future raises BrokenExecutor if the actor dies."""
        self.start()
        future: Future[Seen] = Future()
        asked = self._actor.make.remote(job, list(names)).future()
        asked.add_done_callback(lambda told: settle(future, told.result))
        return future

    def rest(self) -> Future[dict[str, int]]:
        """Have it let go of what it opened for a stage, and tell what memory that took."""
        future: Future[dict[str, int]] = Future()
        if self._actor is None:
            future.set_exception(LostError("it was never started"))
            return future

        def told(asked: Future[dict[str, int]]) -> None:
            if asked.exception() is None:
                future.set_result(asked.result())
            else:
                future.set_exception(LostError("it died since its last units"))

        self._actor.rest.remote().future().add_done_callback(told)
        return future

    def stop(self) -> None:
        """Kill the actor if it lives. Nothing is lost: what it finished is on the disk."""
        if self._actor is None:
            return
        ray = _ray()
        ray.kill(self._actor)
        with contextlib.suppress(Exception):  # that is how a dead one answers
            ray.get(self._actor.pid.remote(), timeout=ENDS)
        self._actor = self._pid = None


class Maker:
    """What an actor does. Made on its node, before anything is imported there."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        os.environ.update(settings)

    def pid(self) -> int:
        return os.getpid()

    def make(self, job: Job, names: Sequence[str]) -> Answer:
        return answer(job, names)

    def rest(self) -> dict[str, int]:
        return forget()


def _ray() -> Any:
    import ray

    return ray


def _no_cluster(address: str, why: str) -> str:
    return (
        f"executor.address={address}: no Ray cluster answers there ({why.strip().rstrip('.')}). "
        "`ray status` on a node tells of one that runs, `ray start --head` starts one; "
        "executor.address=null starts one on this machine for the run"
    )
