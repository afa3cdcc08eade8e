import fcntl
import multiprocessing
import os
import threading
import time

import pytest
from filelock import FileLock, Timeout

from dirotq.pipeline import locks
from dirotq.pipeline.locks import InUseError, alone, lock_of, shared

KEY = "0123456789abcdef"


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / "store" / ".locks").mkdir(parents=True)
    return tmp_path / "store" / "toy" / KEY


def test_readers_share_and_makers_do_not(artifact):
    with shared(artifact), shared(artifact, wait=False):
        with pytest.raises(InUseError, match=f"toy-{KEY} is in use"), alone(artifact, wait=False):
            pass
        assert locks.is_held(artifact)
    with alone(artifact):
        for lock in (shared, alone):
            with pytest.raises(InUseError), lock(artifact, wait=False):
                pass
    assert not locks.is_held(artifact)


def test_what_belongs_to_a_key_has_its_lock(artifact):
    assert lock_of(artifact.with_name(f"{KEY}.partial")) == lock_of(artifact)
    assert lock_of(artifact.with_name(f"{KEY}.trash-1")) == lock_of(artifact)
    assert lock_of(artifact.with_name("fedcba9876543210")) != lock_of(artifact)


def test_an_older_dirotq_locks_the_same_way(artifact):
    old = FileLock(lock_of(artifact))
    with shared(artifact), pytest.raises(Timeout):
        old.acquire(timeout=0)
    with old, pytest.raises(InUseError), shared(artifact, wait=False):
        pass


def test_who_waits_gets_it_when_the_last_reader_leaves(artifact, caplog):
    caplog.set_level("INFO")
    order = []

    def make():
        with alone(artifact):
            order.append("made")

    with shared(artifact):
        maker = threading.Thread(target=make)
        maker.start()
        while not caplog.messages:
            time.sleep(0.01)
        order.append("read")
    maker.join(10)
    assert order == ["read", "made"]
    assert caplog.messages == [f"waiting for another process that computes or reads toy-{KEY}"]


def _die_with_the_lock(artifact):
    with alone(artifact):
        os._exit(1)


def test_a_lock_ends_with_its_process(artifact):
    child = multiprocessing.get_context("fork").Process(target=_die_with_the_lock, args=[artifact])
    child.start()
    child.join(10)
    with alone(artifact, wait=False):
        pass


def test_a_removed_lock_file_locks_nobody_out_and_lets_nobody_in(artifact):
    with alone(artifact):
        waiting = os.open(lock_of(artifact), os.O_RDWR)  # opened, and then the file is removed
    lock_of(artifact).unlink()
    fcntl.flock(waiting, fcntl.LOCK_EX)
    with alone(artifact, wait=False), pytest.raises(InUseError), shared(artifact, wait=False):
        pass
    os.close(waiting)


def test_a_reader_goes_without_where_there_can_be_no_lock(tmp_path):
    with shared(tmp_path / "nowhere" / "toy" / KEY):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"), alone(tmp_path / "nowhere" / "toy" / KEY):
        pass


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_whom_the_umask_allows_may_lock(artifact, umask):
    before = os.umask(umask)
    try:
        with shared(artifact):
            pass
    finally:
        os.umask(before)
    assert lock_of(artifact).stat().st_mode & 0o777 == 0o666 & ~umask
