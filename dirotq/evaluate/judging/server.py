"""A judge behind an OpenAI-compatible server: vLLM, SGLang, a hosted model.

Its settings, what can be known to be wrong with them, and the request that they make of a question.
"""

import importlib.util
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.answer import SCHEMA
from dirotq.evaluate.judging.backend import Compare, Reply
from dirotq.evaluate.judging.chat import connected, pacer
from dirotq.evaluate.judging.questions import Correction, Pair
from dirotq.evaluate.judging.rubric import Message, Rubric
from dirotq.evaluate.png import png_url
from dirotq.pipeline.settings import close_to
from dirotq.pipeline.stage import untracked

# What servers take beside the fields that are set here: OpenAI's and other hosted ones, vLLM's,
# SGLang's, Ollama's. Anything else is a mistake, or a key, and fields stand in the recipe of an
# artifact that people pass on.
_FIELDS = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
chat_template_kwargs continue_final_message custom_params ebnf echo enable_thinking format
frequency_penalty guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
ignore_eos include_stop_str_in_output json_schema keep_alive length_penalty logit_bias logprobs
lora_path max_completion_tokens metadata min_p min_tokens mm_processor_kwargs modalities models
n no_stop_trim options plugins prediction presence_penalty priority prompt_cache_retention
provider reasoning reasoning_effort regex repetition_penalty request_id response_format route
safety_identifier safety_settings seed separate_reasoning service_tier skip_special_tokens
spaces_between_special_tokens stop stop_token_ids store stream_reasoning structured_outputs
think thinking thinking_budget top_k top_logprobs top_p transforms truncate_prompt_tokens user
verbosity vllm_xargs
"""
FIELDS = frozenset(_FIELDS.split())


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
    ``timeout``      seconds until a connection is there, until an answer begins, until it is whole
    ``attempts``     how often a question is sent before it counts as failed. Answers 408, 409, 429
                     and 5xx, bodies that are no completion, timeouts and broken connections are
                     sent again after 0.5 to 8 s, or as a Retry-After of up to two minutes says
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

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"judge.backend.{name}={value}: use at least 1")
        for name in ("timeout", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"judge.backend.{name}={value}: use more than 0")
        if unknown := sorted(map(str, self.extra.keys() - FIELDS)):
            raise ConfigError(
                f"judge.backend.extra.{unknown[0]}: no server is known to take such a field;"
                f"{close_to(unknown[0], FIELDS)} known are {', '.join(sorted(FIELDS))}. A key "
                "belongs into an environment variable, named in judge.backend.api_key_env"
            )
        _check_url(self.base_url)
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
        """Raise ConfigError if the key's variable is not set or ``openai`` is not installed."""
        self._key()
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(
                "judge=openai needs the package openai, which is not installed: "
                "pip install 'dirotq[judge]', or use judge=local or judge=attributes"
            )

    @contextmanager
    def open(self, rubric: Rubric, stop: threading.Event) -> Iterator[Compare]:
        self.check()
        with connected(
            self.base_url,
            self._key(),
            before=pacer(self.requests_per_minute, stop),
            timeout=self.timeout,
            attempts=self.attempts,
        ) as send:

            def compare(pair: Pair, corrections: Sequence[Correction]) -> Reply:
                return send(self._fields(rubric.conversation(pair, corrections, _image_part)))

            yield compare

    def _fields(self, messages: Sequence[Message]) -> dict[str, Any]:
        schema = {"name": "comparison", "strict": True, "schema": SCHEMA}
        form = {"type": "json_schema", "json_schema": schema}
        fields = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "response_format": form if self.structured else None,
        }
        return {k: v for k, v in fields.items() if v is not None} | dict(self.extra)

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
        if not re.fullmatch(r"[!-~]+", key):  # libraries repeat what they can't send
            raise ConfigError(
                f"judge.backend.api_key_env{said}, and that environment variable holds no key: a "
                "key is one word of ASCII characters"
            )
        return key


def _image_part(image: Tensor) -> Message:
    return {"type": "image_url", "image_url": {"url": png_url(image)}}


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError:  # [ in the host
        parts = urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "judge.backend.base_url carries a user name, password or query, which logs would show; "
            "put the key into an environment variable and name it in judge.backend.api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            "judge.backend.base_url is no address; give the server's, such as "
            "http://127.0.0.1:8000/v1"
        )
