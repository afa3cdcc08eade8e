"""The bytes of a stage do not depend on how many processes made its units."""

import pytest
import torch
from tiny_line import stage, tree_bytes

from dirotq.pipeline.crew import Crew
from dirotq.pipeline.divided import in_units
from dirotq.pipeline.units import JOURNAL
from dirotq.pipeline.worker import Processes

STAGES = {
    "capture": (),
    "basis": ("capture",),
    "gptq": ("capture", "basis", "rank"),
    "fuse": ("capture", "basis", "rank"),
}


@pytest.fixture(scope="module")
def crews():
    """{workers: a crew}, with one thread per process: sums of several threads are rounded otherwise
    than those of one, whoever computes them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, Crew(processes := Processes(2)) as two:
        patch.setenv("OMP_NUM_THREADS", "1")
        for worker in processes.workers:  # as commands do: they import in less time so
            worker.start()
            worker.prepare()
        yield {1: (), 2: (two.share, two.chain)}
    torch.set_num_threads(threads)


def test_bytes_do_not_depend_on_the_workers(line, finished, crews, tmp_path, caplog):
    """One test: parametrized, each process of pytest-xdist would start a crew."""
    for name, slots in STAGES.items():
        inputs, found = {slot: finished[slot] for slot in slots}, {}
        for workers, way in crews.items():
            out = tmp_path / name / str(workers)
            out.mkdir(parents=True)
            metrics = in_units(stage(line(), name), out, inputs, *way)
            made = {n: b for n, b in tree_bytes(out).items() if not n.startswith(JOURNAL)}
            found[workers] = made, metrics
        assert set(found[1][0]) == set(tree_bytes(finished[name].data)), name
        assert found[1] == found[2], name
    assert "alone" not in caplog.text  # no part was done by one process
