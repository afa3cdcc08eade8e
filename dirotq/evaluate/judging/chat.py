"""One question to an OpenAI-compatible server: sent, sent again where that may help, read."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx
from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_random_exponential,
)

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.answer import SCHEMA
from dirotq.evaluate.judging.backend import Reply, Unanswered
from dirotq.evaluate.judging.pacing import Pacer, retry_after
from dirotq.evaluate.judging.pair import Correction, Pair
from dirotq.evaluate.judging.rubric import Rubric, Slot, Turn
from dirotq.evaluate.png import png_url

if TYPE_CHECKING:
    from dirotq.evaluate.judging.server import OpenAIServer

PASSING = (408, 425, 429)
"""Statuses below 500 that another attempt may get past."""
LONGEST = 1 << 20
"""Bytes of a response: an answer is a few hundred words."""
FILTERED = ("content_filter", "content_policy_violation", "moderation_blocked")
"""Error codes of hosted services that mean: refused."""


class _Passing(Exception):
    """This attempt failed; another one may not."""


class Chat:
    """The function that ``OpenAIServer.open`` hands out; safe to call from several threads."""

    def __init__(
        self,
        settings: "OpenAIServer",
        rubric: Rubric,
        client: httpx.Client,
        pacer: Pacer,
        stop: threading.Event,
        *,
        secret: str | None,
    ) -> None:
        self.settings, self.rubric, self.client = settings, rubric, client
        self.pacer, self.stop, self.secret = pacer, stop, secret
        self.url = settings.base_url.rstrip("/") + "/chat/completions"

    def __call__(self, pair: Pair, corrections: Sequence[Correction]) -> Reply:
        body = self._body(pair, corrections)
        retrying = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_attempt(self.settings.attempts) | stop_when_event_set(self.stop),
            wait=wait_random_exponential(multiplier=self.settings.backoff, max=60),
            sleep=sleep_using_event(self.stop),
            reraise=True,
        )
        attempt = 0
        try:
            for tried in retrying:
                with tried:
                    attempt += 1
                    text, refused = self._attempt(body, attempt)
        except _Passing as error:
            raise Unanswered(str(error), attempt - 1) from error
        return Reply(text, refused, attempt - 1)

    def _body(self, pair: Pair, corrections: Sequence[Correction]) -> dict[str, Any]:
        images = {Slot.FIRST: png_url(pair.first), Slot.SECOND: png_url(pair.second)}
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [
                _message(turn, images) for turn in self.rubric.conversation(pair, corrections)
            ],
        }
        if settings.temperature is not None:
            body["temperature"] = settings.temperature
        if settings.max_tokens is not None:
            body["max_tokens"] = settings.max_tokens
        if settings.structured:
            schema = {"name": "comparison", "strict": True, "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body | dict(settings.extra)

    def _attempt(self, body: Mapping[str, Any], attempt: int) -> tuple[str, bool]:
        """The answer's text, and whether it is a refusal."""
        self.pacer.wait()
        if self.stop.is_set():
            raise _Passing("stopped before it was sent")
        status, headers, content = self._send(body)
        # Servers repeat keys in their messages; nothing that leaves here holds ours.
        text = content.decode(errors="replace")
        text = text.replace(self.secret, "***") if self.secret else text
        if status == 200:
            return _choice(text)
        shown = f"HTTP {status}: {text[:300]}"
        if status in PASSING or status >= 500:
            if (wait := retry_after(headers.get("Retry-After"))) is not None:
                if wait > self.settings.max_wait:
                    raise Unanswered(
                        f"{shown}; it asks to wait {wait:.0f} s, more than "
                        f"judge.backend.max_wait={self.settings.max_wait:g}",
                        attempt - 1,
                    )
                self.pacer.hold(wait)
            raise _Passing(shown)
        if any(code in text for code in FILTERED):
            return text, True
        raise ConfigError(
            f"the judge's server {self.url} refuses the request: {shown}. Look at "
            f"judge.backend.model={self.settings.model}, api_key_env, base_url, structured and "
            "extra"
        )

    def _send(self, body: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body, within the timeout all together."""
        until = time.monotonic() + self.settings.timeout
        content = b""
        try:
            with self.client.stream("POST", self.url, json=body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    # httpx's timeout is one of each read: a server may drip for ever.
                    if time.monotonic() > until:
                        raise _Passing(f"no whole answer within {self.settings.timeout:g} s")
                    if len(content) > LONGEST:
                        raise _Passing(f"an answer of more than {LONGEST} bytes")
        except httpx.RequestError as error:
            raise _Passing(f"{type(error).__name__} at {self.url}: {error}") from error
        return response.status_code, response.headers, content


def _choice(text: str) -> tuple[str, bool]:
    """The text of a response's first choice, and whether it is a refusal."""
    try:
        choice = json.loads(text)["choices"][0]
        message = choice["message"]
        if refusal := message.get("refusal"):
            return str(refusal), True
        content = message["content"]
        if choice.get("finish_reason") == "content_filter":
            return str(content or "content_filter"), True
        if not isinstance(content, str):
            raise TypeError(f"its content is {content!r:.40}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Passing(
            f"no chat completion ({type(error).__name__}: {error}): {text[:200]}"
        ) from error
    return content, False


def _message(turn: Turn, images: Mapping[Slot, str]) -> dict[str, Any]:
    texts = [part for part in turn.parts if isinstance(part, str)]
    if len(texts) == len(turn.parts):
        # Some chat templates take lists of parts from users only.
        return {"role": turn.role, "content": "\n".join(texts)}
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": images[part]}}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": parts}
