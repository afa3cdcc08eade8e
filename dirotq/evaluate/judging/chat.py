"""One request to an OpenAI-compatible server: sent, sent again where that may help, read.

The package ``openai`` does the sending. It is imported only when there is something to ask.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.backend import Reply, Unanswered

if TYPE_CHECKING:
    import httpx2

PASSING = (408, 409, 429)
"""Statuses below 500 that another attempt may get past."""
FILTERED = ("content_filter", "content_policy_violation", "moderation_blocked")
"""Error codes of hosted services that mean: refused."""
LONGEST = 300
"""Characters of a server's words in a message, cut after the key was hidden."""

Send = Callable[[Mapping[str, Any]], Reply]


@contextmanager
def connected(
    base_url: str,
    key: str | None,
    *,
    before: Callable[[object], None],
    timeout: float,
    attempts: int,
) -> Iterator[Send]:
    """Make a function that sends the fields of a chat completion; safe to call from threads.

    It raises Unanswered if no answer came in ``attempts`` sendings, and ConfigError for what the
    server will refuse for ever.

    key      the bearer token; None: none is sent, whatever the environment holds
    before   called before each sending, repetitions included
    timeout  seconds until an answer begins, and again until it is whole
    """
    import openai

    url = base_url.rstrip("/") + "/chat/completions"
    http = openai.DefaultHttpxClient(
        event_hooks={"request": [before], "response": [_whole_within(timeout), _refuse_torn]},
        follow_redirects=False,  # a key goes to the address that it was given for
    )

    def hidden(text: str) -> str:
        """Servers repeat keys in their messages; nothing that leaves here holds ours."""
        return text.replace(key, "***") if key else text

    def send(fields: Mapping[str, Any]) -> Reply:
        try:
            response = client.chat.completions.with_raw_response.create(
                model=fields["model"],
                messages=fields["messages"],
                extra_body=fields,
                extra_headers={} if key else {"Authorization": openai.Omit()},
            ).http_response
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            why = error.__cause__
            said = hidden(f"{type(why).__name__} at {url}: {why}")
            raise Unanswered(said[:LONGEST], _retries(error.request)) from None
        retries = _retries(response.request)
        if response.is_success:
            text, refused = _choice(response.text)
            return Reply(hidden(text), refused, retries)
        return _refused(url, fields["model"], response.status_code, hidden(response.text), retries)

    with openai.OpenAI(
        api_key=key or "none",  # else it looks for one in the environment
        base_url=base_url,
        timeout=timeout,
        max_retries=attempts - 1,
        http_client=http,
    ) as client:
        yield send


def pacer(per_minute: float | None, stop: threading.Event) -> Callable[[object], None]:
    """Return a function that waits until the next request may start, called before each one.

    Requests of all threads, repetitions included, are spaced evenly: at most ``per_minute`` of them
    start in a minute (None: no limit). Once ``stop`` is set it raises Unanswered instead.
    """
    interval = 60 / per_minute if per_minute else 0.0
    lock, due = threading.Lock(), time.monotonic()

    def wait(request: object) -> None:
        nonlocal due
        with lock:
            start = max(due, time.monotonic())
            due = start + interval
        if stop.wait(start - time.monotonic()):
            raise Unanswered("stopped before it was sent", 0)

    return wait


def _refused(url: str, model: str, status: int, text: str, retries: int) -> Reply:
    """Return the refusal of a filter; raise Unanswered or ConfigError for another error status."""
    shown = f"HTTP {status}: {text[:LONGEST]}"
    if status in PASSING or status >= 500:
        raise Unanswered(shown, retries)
    if any(code in text for code in FILTERED):
        return Reply(text, True, retries)
    raise ConfigError(
        f"the judge's server {url} refuses the request: {shown}. Look at "
        f"judge.backend.model={model}, api_key_env, base_url, structured and extra"
    )


def _whole_within(seconds: float) -> Callable[["httpx2.Response"], None]:
    """Return a hook that bounds the time of a body: the client's own limit is one of each pause."""
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream) -> None:
            self.stream, self.end = stream, time.monotonic() + seconds

        def __iter__(self) -> Iterator[bytes]:
            for part in self.stream:
                if time.monotonic() > self.end:
                    raise httpx2.ReadTimeout(f"the answer was not whole after {seconds:g} s")
                yield part

        def close(self) -> None:
            self.stream.close()

    def bound(response: httpx2.Response) -> None:
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = Bounded(response.stream)

    return bound


def _refuse_torn(response: "httpx2.Response") -> None:
    """Raise what the client takes for a broken connection where a body is no completion."""
    import httpx2

    if response.is_success:
        response.read()
        try:
            _choice(response.text)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise httpx2.DecodingError(
                f"no chat completion ({type(error).__name__}: {error}): {response.text}"
            ) from error


def _choice(text: str) -> tuple[str, bool]:
    """Return the text of a response's first choice, and whether it is a refusal."""
    choice = json.loads(text)["choices"][0]
    message = choice["message"]
    if refusal := message.get("refusal"):
        return str(refusal), True
    content = message["content"]
    if choice.get("finish_reason") == "content_filter":
        return str(content or "content_filter"), True
    if not isinstance(content, str):
        raise TypeError(f"its content is {content!r:.40}")
    return content, False


def _retries(request: "httpx2.Request") -> int:
    """Return how often the client had sent this question before."""
    return int(request.headers.get("x-stainless-retry-count", 0))
