"""A judge behind an OpenAI-compatible server: vLLM, SGLang, a hosted model."""

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.backend import Compare
from dirotq.evaluate.judging.chat import Chat
from dirotq.evaluate.judging.pacing import Pacer
from dirotq.evaluate.judging.request_fields import FIELDS
from dirotq.evaluate.judging.rubric import Rubric
from dirotq.pipeline.settings import close_to
from dirotq.pipeline.stage import untracked


@dataclass(frozen=True, kw_only=True)
class OpenAIServer:
    """Asks ``{base_url}/chat/completions``; images travel as PNG data URLs.

    ``model``        the name under which the server knows it; the judge's identity
    ``temperature``  and ``max_tokens`` are left out of requests where null
    ``structured``   send the answer's JSON schema as ``response_format``
    ``extra``        more fields of the request, of those in ``FIELDS``
    ``api_key_env``  the environment variable that holds the key, or null. The key itself is sent
                     as a bearer token and stands in no file, log line or message
    ``concurrency``  requests under way at a time; ``requests_per_minute`` that start, or null
    ``timeout``      seconds for one answer, from the request to its last byte
    ``attempts``     how often a question is sent before it counts as failed. Answers 408, 425, 429
                     and 5xx, timeouts and broken connections are sent again
    ``backoff``      seconds before the first repetition, at most; twice as long each time, up to a
                     minute. A Retry-After holds up every request instead,
    ``max_wait``     unless it asks for more seconds than this
    """

    recorded_as: ClassVar[str] = "dirotq.judging.server.OpenAIServer"
    model: str
    temperature: float | None
    max_tokens: int | None
    structured: bool
    extra: Mapping[str, Any]
    base_url: str = untracked()
    api_key_env: str | None = untracked()
    concurrency: int = untracked()
    requests_per_minute: float | None = untracked()
    timeout: float = untracked()
    attempts: int = untracked()
    backoff: float = untracked()
    max_wait: float = untracked()

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("attempts", 1), ("backoff", 0), ("max_wait", 0)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"judge.backend.{name}={getattr(self, name)}: use at least {least}"
                )
        for name in ("timeout", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"judge.backend.{name}={value}: use more than 0")
        if unknown := sorted(map(str, self.extra.keys() - FIELDS)):
            raise ConfigError(
                f"judge.backend.extra.{unknown[0]}: no server is known to take such a field;"
                f"{close_to(unknown[0], FIELDS)} known are {', '.join(sorted(FIELDS))}. A key "
                "belongs into an environment variable, named in judge.backend.api_key_env"
            )
        self._check_url()
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.api_key_env):
            # Not repeated here: somebody may have put the key itself there.
            raise ConfigError(
                "judge.backend.api_key_env is no name of an environment variable (capital letters, "
                "digits, _); put the key into a variable such as OPENAI_API_KEY and give its name"
            )

    @property
    def name(self) -> str:
        return self.model

    def check(self) -> None:
        """Raise ConfigError if the environment variable of the key is not set."""
        self._key()

    @contextmanager
    def open(self, rubric: Rubric, stop: threading.Event) -> Iterator[Compare]:
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        with httpx.Client(headers=headers, timeout=self.timeout, limits=limits) as client:
            pacer = Pacer(self.requests_per_minute, sleep=stop.wait)
            yield Chat(self, rubric, client, pacer, stop, secret=key)

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        plain = re.search(r"_(KEY|TOKEN)$", self.api_key_env)  # else it may be the key itself
        said = f"={self.api_key_env}" if plain else " names a variable"
        if not (key := os.environ.get(self.api_key_env, "").strip()):
            raise ConfigError(
                f"judge.backend.api_key_env{said}, and that environment variable is not set; "
                "export it, or use judge.backend.api_key_env=null for a server without a key"
            )
        return key

    def _check_url(self) -> None:
        try:
            parts = urlsplit(self.base_url)
        except ValueError:  # [ in the host
            parts = urlsplit("")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                "judge.backend.base_url carries a user name, password or query, which logs would "
                "show; put the key into an environment variable and name it in "
                "judge.backend.api_key_env"
            )
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                "judge.backend.base_url is no address; give the server's, such as "
                "http://127.0.0.1:8000/v1"
            )
