"""Where steps run. An executor is a ``concurrent.futures.Executor``; this one is the default."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class LocalExecutor(Executor):
    """Runs each call at once, in this process and thread, so that Ctrl-C reaches it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return a finished future with the result of ``fn(*args, **kwargs)``, or its error."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - handed on by future.result()
            future.set_exception(error)
        return future
