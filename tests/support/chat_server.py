"""A real HTTP server on loopback that answers, or misbehaves, as a test says."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer(quality: str = "tie", alignment: str = "tie") -> str:
    """An answer of the right form."""
    return json.dumps(
        {
            "perceptual_quality": {"reasons": "seen", "verdict": quality},
            "prompt_alignment": {"reasons": "seen", "verdict": alignment},
        }
    )


def completion(text: str | None, **message: Any) -> "Response":
    """A chat completion with this text."""
    choice = {"message": {"role": "assistant", "content": text} | message, "finish_reason": "stop"}
    return Response(200, json.dumps({"choices": [choice]}))


@dataclass
class Response:
    """``drop``: close the connection instead. ``drip``: seconds before each byte of the body."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    drip: float = 0.0


def scripted(*responses: Response) -> Callable[[int, object], Response]:
    """Each response once, the last one for ever."""
    return lambda number, body: responses[min(number, len(responses) - 1)]


@dataclass
class ChatServer:
    """``behave(number of the request, its body)`` is called in the request's own thread."""

    behave: Callable[[int, dict[str, Any]], Response]
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(behave: Callable[[int, dict[str, Any]], Response]) -> Iterator[ChatServer]:
    """Serve until the block ends."""
    state = ChatServer(behave)

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a test that forgets a client ends all the same

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.headers.append({k.lower(): v for k, v in self.headers.items()})
                state.paths.append(self.path)
                state.running += 1
                state.most = max(state.most, state.running)
            try:
                response = state.behave(number, body)
            finally:
                with state.lock:
                    state.running -= 1
            if response.drop:
                self.close_connection = True
                return
            content = response.body.encode()
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            step = 1 if response.drip else max(len(content), 1)
            for start in range(0, len(content), step):
                time.sleep(response.drip)
                self.wfile.write(content[start : start + step])

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client gave up, as it should
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
