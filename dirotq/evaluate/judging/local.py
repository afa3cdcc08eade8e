"""A vision-language model in a local folder as judge, through transformers."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ConfigError, UnsupportedError
from dirotq.evaluate.judging.backend import Compare, Reply
from dirotq.evaluate.judging.questions import Correction, Pair
from dirotq.evaluate.judging.rubric import Message, Rubric, text_part
from dirotq.evaluate.png import picture
from dirotq.files.digest import input_digests
from dirotq.files.walk import walk
from dirotq.pipeline.stage import untracked
from dirotq.sources.doors import refuse_part


@dataclass(frozen=True, kw_only=True)
class LocalModel:
    """Asks the model in a folder that ``save_pretrained`` wrote (config, weights, processor).

    ``path``         the folder; its files' digests are the judge's identity. Nothing is downloaded
                     and no code in the folder is run
    ``temperature``  0: greedy, so that repeating a question tells nothing
    ``max_tokens``   of one answer
    ``device``       auto, cpu, cuda or cuda:N; one question at a time
    """

    path: str
    temperature: float
    max_tokens: int
    device: str = untracked()

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_tokens < 1:
            raise ConfigError(
                f"judge.backend.temperature={self.temperature}, max_tokens={self.max_tokens}: use "
                "at least 0 and 1"
            )

    @property
    def name(self) -> str:
        return self._folder().name

    @property
    def concurrency(self) -> int:
        return 1

    def identity(self) -> dict[str, Any]:
        root = self._folder()
        files = [p for p in walk(root) if p.name[0] != "."]
        digests = input_digests(files)
        return {
            "class": "dirotq.judging.local.LocalModel",
            "files": {str(p.relative_to(root)): digests[p] for p in files},
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def check(self) -> None:
        """Raise ConfigError if there is no model in the folder."""
        self._folder()

    @contextmanager
    def open(self, rubric: Rubric, stop: threading.Event) -> Iterator[Compare]:
        import transformers

        folder, device = self._folder(), pick_device(self.device)
        # Without trust_remote_code transformers asks at the terminal whether to run code.
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            processor: Any = transformers.AutoProcessor.from_pretrained(folder, **local)
            model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, use_safetensors=True, dtype=compute_dtype(device), **local
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise UnsupportedError(
                f"judge.backend.path={self.path}: transformers {transformers.__version__} can't "
                f"load a vision-language model from it ({error}). Give the folder of one that "
                "AutoModelForImageTextToText knows, or serve it and use judge=openai"
            ) from error
        model.to(device).eval()

        def compare(pair: Pair, corrections: Sequence[Correction]) -> Reply:
            inputs = processor.apply_chat_template(
                _in_parts(rubric.conversation(pair, corrections, _image_part)),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(device, model.dtype)
            sampling = (
                {"do_sample": True, "temperature": self.temperature}
                if self.temperature
                else {"do_sample": False}
            )
            tokens = model.generate(**inputs, max_new_tokens=self.max_tokens, **sampling)
            fresh = tokens[:, inputs["input_ids"].shape[1] :]
            return Reply(processor.batch_decode(fresh, skip_special_tokens=True)[0])

        yield compare

    def _folder(self) -> Path:
        folder = Path(self.path).expanduser().absolute()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"judge.backend.path={self.path} holds no model (no config.json); give the local "
                "folder of a vision-language model, as save_pretrained or `hf download` writes it"
            )
        refuse_part(folder)
        return folder


def _image_part(image: Tensor) -> Message:
    return {"type": "image", "image": picture(image)}


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    """Return ``messages`` as processors take them: every content a list of parts."""
    return [
        m | {"content": [text_part(m["content"])]} if isinstance(m["content"], str) else m
        for m in messages
    ]
