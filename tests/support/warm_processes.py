"""Processes that start with what takes long to import.

They are forks of one server, which is started when the first of them is, has done nothing but
import, and so has no threads that a fork would wait for.
"""

import importlib
import multiprocessing
import os
import signal
from multiprocessing.context import ForkServerContext
from typing import Any

from dirotq.pipeline.worker import IMPORTED


def warm_processes() -> ForkServerContext:
    """A context of ``multiprocessing`` to start them with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "diffusers.pipelines.flux.pipeline_flux"])
    return context


def run_and_die(module: str, name: str, count: int, command: list[str]) -> None:
    """Run the line, in a process that kills itself at call ``count`` + 1 of a function."""
    from tiny_line import run

    from dirotq.pipeline.config import build, compose_config

    os.fsync = lambda handle: None  # as in conftest.py
    owner = importlib.import_module(module)
    right = getattr(owner, name)

    def kill_at(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*args, **kwargs)

    setattr(owner, name, kill_at)
    run(build(compose_config(command, "dirotq.conf")))
