"""Prompt sets: JSONL files read through `datasets`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dirotq.digest import file_digest
from dirotq.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption, the seed of its noise, and, for rendered scenes, what the image must show."""

    text: str
    seed: int
    attributes: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """``count`` rows of a JSONL file, from row ``start``: ``prompt`` and, optionally, ``seed`` and
    ``attributes``.

    A row without a seed gets its row number, so a prompt's noise never depends on batching.
    """

    path: str
    start: int
    count: int

    def identity(self) -> dict[str, Any]:
        """Bytes, not path: a moved or renamed file is the same prompt set."""
        return {"prompts": file_digest(self._file()), "start": self.start, "count": self.count}

    def load(self) -> list[Prompt]:
        """Raises ConfigError if the file is missing, has fewer rows, or rows without a prompt."""
        from datasets import load_dataset

        stream = load_dataset("json", data_files=str(self._file()), split="train", streaming=True)
        rows = list(stream.skip(self.start).take(self.count))
        if len(rows) < self.count or self.count < 1:
            raise ConfigError(
                f"{self.path} holds {len(rows)} prompts from row {self.start} on, {self.count} "
                "were asked for; set prompts.calibration.count or prompts.heldout.count to 1 ... "
                "that many"
            )
        for number, row in enumerate(rows, self.start):
            if not isinstance(row.get("prompt"), str):
                raise ConfigError(
                    f"{self.path}, row {number + 1}: no text under 'prompt' (found {sorted(row)}); "
                    'each line is {"prompt": "...", "seed": 1}'
                )
        return [
            Prompt(row["prompt"], _seed(row, number), row.get("attributes"))
            for number, row in enumerate(rows, self.start)
        ]

    def _file(self) -> Path:
        path = resolve(self.path)
        if not path.is_file():
            raise ConfigError(
                f"prompt file {self.path} does not exist; give a JSONL file, one "
                '{"prompt": "...", "seed": 1} per line, as prompts.calibration.path=FILE'
            )
        return path


def resolve(path: str) -> Path:
    """A path as the user sees it; ``assets://x`` is a file that ships with the package."""
    if path.startswith("assets://"):
        import dirotq.assets

        return Path(dirotq.assets.__path__[0]) / path.removeprefix("assets://")
    return Path(path).expanduser()


def _seed(row: Mapping[str, Any], number: int) -> int:
    return number if row.get("seed") is None else int(row["seed"])
