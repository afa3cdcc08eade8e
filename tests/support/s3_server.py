"""A real S3 API on loopback (moto's server), behind faults to order: 500s, cut answers, slow ones.

``python -m s3_server --share 0.05`` serves until its end is closed, and prints its address first.
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Start = Callable[..., Any]


@dataclass
class BadServer:
    """A WSGI application between client and server.

    share  of requests that go wrong, a third each: refused with 500, cut in the middle of the
           answer, slow by ``pause`` seconds
    """

    inner: Callable[[dict[str, Any], Start], Iterable[bytes]]
    share: float = 0.0
    pause: float = 0.5
    asked: int = 0
    failed: int = 0
    choose: random.Random = field(default_factory=lambda: random.Random(0))

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        fate = self.choose.random() / self.share if self.share else 1
        self.asked += 1
        self.failed += fate < 1
        if fate < 1 / 3:
            start("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>We failed</Message></Error>"]
        if fate < 2 / 3:
            return self._cut(environ, start)
        if fate < 1:
            time.sleep(self.pause)
        return self.inner(environ, start)

    def _cut(self, environ: dict[str, Any], start: Start) -> Iterator[bytes]:
        body = b"".join(self.inner(environ, start))
        yield body[: len(body) // 2]
        raise ConnectionResetError("cut")


@contextmanager
def serving(share: float = 0.0) -> Iterator[tuple[str, BadServer]]:
    """Serve on a free port of this machine; yields the address, and what goes wrong there."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    bad = BadServer(DomainDispatcherApplication(create_backend_app), share)
    server = make_server("127.0.0.1", 0, bad, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bad
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=0.0)
    with serving(parser.parse_args().share) as (address, _):
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
