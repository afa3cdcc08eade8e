"""Ray and SLURM's jobs on this machine: `make test-clusters` installs what they need."""

import contextlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from tiny_fixtures import *  # noqa: F403

from dirotq.pipeline.ray_cluster import RayExecutor
from dirotq.pipeline.slurm_cluster import SlurmExecutor

# Part of them could run without, and would take a minute of `make test`.
try:
    collect_ignore_glob: list[str] = []
    for name in ("ray", "submitit"):
        version(name)
except PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]


def ray(**changes):
    return RayExecutor(**{"workers": 2, "cpus": 1, "gpus": 0, "address": None} | changes)


def slurm(**changes):
    given = {"workers": 2, "cpus": 1, "gpus": 0, "minutes": 5, "cluster": "local", "options": {}}
    return SlurmExecutor(**given | changes)


@pytest.fixture(scope="session", autouse=True)
def found_by_workers():
    """What this process imports, workers find too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        with contextlib.suppress(ImportError):  # on this disk a missing result won't show late
            patch.setattr("submitit.core.core.Job._results_timeout_s", 1)
        yield


@pytest.fixture(scope="module", params=[ray, slurm], ids=lambda make: make.__name__)
def run(request):
    """Run a stage with two workers, which stay from test to test."""
    with request.param().opened() as run:
        yield run
