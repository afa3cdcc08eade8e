"""Prompt sets: a local file or a dataset of the Hugging Face Hub, read through `datasets`."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dirotq.digest import file_digest, input_digests
from dirotq.errors import ConfigError
from dirotq.hub import HubPath, explained, hub_path

READERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
WHOLE = (".json", ".yaml", ".yml")
"""Read at once: a list of rows, or {id: row} or {id: text}, as benchmarks publish their prompts."""
IMAGES = ("image", "mask_image")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption, the seed of its noise, and, for rendered scenes, what the image must show.

    ``inputs``  paths of the images that an editing pipeline starts from ({"image": ...})
    """

    text: str
    seed: int
    attributes: Mapping[str, Any] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """``count`` prompts from row ``start`` of a file or dataset.

    ``path``    .jsonl, .json, .csv, .parquet, .yaml or .txt (one prompt a line); or on the hub:
                ``org/name[@revision]`` (with ``subset`` and ``split``), or a file in it,
                ``org/name/file.json[@revision]``
    ``column``  where the text is; of a list of captions the first one counts

    Optional columns are ``seed`` (else the row's number, so a prompt's noise never depends on
    batching), ``attributes``, and in local files ``image`` and ``mask_image``: paths, relative ones
    from the file's folder.
    """

    path: str
    start: int
    count: int
    column: str = "prompt"
    subset: str | None = None
    split: str = "train"

    def identity(self) -> dict[str, Any]:
        """Bytes, not path: a moved or renamed file is the same prompt set. Of the hub, a commit."""
        chosen = {"column": self.column, "start": self.start, "count": self.count}
        if (place := self._on_hub()) is not None:
            part = {"subset": self.subset, "split": self.split}
            return place.identity() | ({"file": place.file} if place.file else part) | chosen
        images = [Path(i) for prompt in self.load() for i in prompt.inputs.values()]
        shown = list(input_digests(dict.fromkeys(images)).values())
        return (
            {"prompts": file_digest(self._file())} | chosen | ({"images": shown} if shown else {})
        )

    def load(self) -> list[Prompt]:
        """Raises ConfigError if the set is missing, has fewer rows, or rows without a text."""
        place = self._on_hub()
        stamp = place.commit if place is not None else file_digest(self._file())
        return list(_load(self, place, stamp))

    def _on_hub(self) -> HubPath | None:
        """The dataset that ``path`` names, unless there is such a file here."""
        if "://" in self.path or resolve(self.path).exists():
            return None
        return hub_path(self.path, "dataset")

    def _file(self) -> Path:
        path = resolve(self.path)
        if not path.is_file():
            raise ConfigError(
                f"prompt file {self.path} does not exist; give a JSONL file, one "
                '{"prompt": "...", "seed": 1} per line, as prompts.calibration.path=FILE (or a '
                ".csv, .parquet, .json or .txt file, or the id of a dataset on the hub)"
            )
        return path


def refuse_shared(calibration: Sequence[Prompt], heldout: Sequence[Prompt]) -> None:
    """Raise ConfigError if a held-out prompt, case and spaces apart, calibrates too."""
    seen = {_plain(prompt) for prompt in calibration}
    if shared := [prompt.text for prompt in heldout if _plain(prompt) in seen]:
        raise ConfigError(
            f"{len(shared)} of {len(heldout)} held-out prompts are calibration prompts too, such "
            f"as {shared[0]!r}: the scores would not be those of unseen prompts. Choose other rows "
            "(prompts.heldout.start, prompts.calibration.count) or another file for one of them"
        )


def resolve(path: str) -> Path:
    """A path as the user sees it; ``assets://x`` is a file that ships with the package."""
    if path.startswith("assets://"):
        import dirotq.assets

        return Path(dirotq.assets.__path__[0]) / path.removeprefix("assets://")
    return Path(path).expanduser()


@functools.lru_cache(maxsize=16)
def _load(chosen: PromptSet, place: HubPath | None, stamp: str) -> tuple[Prompt, ...]:
    """``stamp`` tells the content: a plan asks for the same prompts several times."""
    if place is not None and not place.file:
        folder, rows = None, _dataset_rows(chosen, place)
    else:
        file = chosen._file() if place is None else place.download(str(place.file))
        folder, rows = file.parent if place is None else None, _file_rows(chosen, file)
    try:
        found = list(islice(rows, max(chosen.count, 0)))
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"{chosen.path} can't be read ({error}). A prompt set is a .jsonl file, one "
            '{"prompt": "...", "seed": 1} per line, or .json, .csv, .parquet, .yaml or .txt'
        ) from error
    if len(found) < chosen.count or chosen.count < 1:
        raise ConfigError(
            f"{chosen.path} holds {len(found)} prompts from row {chosen.start} on, {chosen.count} "
            "were asked for; set prompts.calibration.count or prompts.heldout.count to 1 ... "
            "that many"
        )
    return tuple(
        _prompt(chosen, row, number, folder) for number, row in enumerate(found, chosen.start)
    )


def _dataset_rows(chosen: PromptSet, place: HubPath) -> Iterator[Mapping[str, Any]]:
    """Rows of a whole dataset, streamed: no more is downloaded than is read."""
    import datasets

    with explained(place, "its rows"):
        try:
            stream = datasets.load_dataset(
                place.id,
                chosen.subset,
                split=chosen.split,
                revision=place.commit,
                streaming=True,
            )
            wanted = [chosen.column, "seed", "attributes"]
            if stream.column_names and chosen.column in stream.column_names:
                # Pictures that nobody looks at are not decoded.
                stream = stream.select_columns([c for c in stream.column_names if c in wanted])
            yield from stream.skip(chosen.start)
        except (ConnectionError, TimeoutError) as error:
            raise ConfigError(
                f"the dataset {place.id} can't be reached ({error}). Connect this machine, or "
                "download a file of it where there is a network (`hf download --repo-type dataset "
                f"{place.id} FILE`) and give that file as path"
            ) from error


def _file_rows(chosen: PromptSet, file: Path) -> Iterator[Mapping[str, Any]]:
    if file.suffix in WHOLE:
        yield from islice(_whole_rows(chosen, file), chosen.start, None)
        return
    if file.suffix not in READERS:
        raise ConfigError(
            f"{chosen.path}: prompts are read from {', '.join((*READERS, *WHOLE))} files, not from "
            f"{file.suffix or 'files without a suffix'}"
        )
    import datasets

    if not file.stat().st_size:
        return  # datasets ends in a StopIteration
    reader = READERS[file.suffix]
    stream = datasets.load_dataset(reader, data_files=str(file), split="train", streaming=True)
    for row in stream.skip(chosen.start):
        yield {chosen.column: row["text"]} if reader == "text" else row


def _whole_rows(chosen: PromptSet, file: Path) -> Iterator[Mapping[str, Any]]:
    if file.suffix == ".json":
        content = json.loads(file.read_text())
    else:
        import yaml

        try:
            content = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    rows: Iterable[Any] = content.values() if isinstance(content, Mapping) else content or ()
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise ValueError("it is neither a list nor a mapping of rows")
    for row in rows:
        yield row if isinstance(row, Mapping) else {chosen.column: row}


def _prompt(chosen: PromptSet, row: Mapping[str, Any], number: int, folder: Path | None) -> Prompt:
    where = f"{chosen.path}, row {number + 1}"
    if chosen.column not in row:
        raise ConfigError(
            f"{where}: there is no column {chosen.column!r}, there are {sorted(row)}; name the one "
            "with the text: prompts.calibration.column=... (and prompts.heldout.column=...)"
        )
    text = row[chosen.column]
    if isinstance(text, Sequence) and not isinstance(text, str) and text:
        text = text[0]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            f"{where}: no text under {chosen.column!r}, but {text!r}; remove the row, or choose "
            "others with prompts.calibration.start (or prompts.heldout.start)"
        )
    seed = row.get("seed")
    if seed is not None and (not isinstance(seed, int | float) or seed != int(seed)):
        raise ConfigError(f"{where}: the seed {seed!r} is no whole number; correct or remove it")
    images = {name: row[name] for name in IMAGES if folder and isinstance(row.get(name), str)}
    inputs = {name: str((folder or Path()) / Path(i).expanduser()) for name, i in images.items()}
    for name, image in inputs.items():
        if not Path(image).is_file():
            raise ConfigError(f"{where}: the {name} {image} does not exist")
    return Prompt(text, number if seed is None else int(seed), row.get("attributes"), inputs)


def _plain(prompt: Prompt) -> tuple[str, tuple[tuple[str, str], ...]]:
    return " ".join(prompt.text.split()).casefold(), tuple(sorted(prompt.inputs.items()))
