"""Prompt sets: a file, or a whole dataset of the Hugging Face Hub, read through `datasets`."""

import functools
import logging
import os
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.files.digest import file_digest, input_digests
from dirotq.models.pipeline_images import PICTURES
from dirotq.sources.hub import HubPath, explained, hub_path
from dirotq.sources.prompt_files import NEGATIVE, READERS, USED, check_picture, rows, treatment

log = logging.getLogger(__name__)

ALIKE = 0.8
"""From it on, difflib takes one name for another misspelt."""
SEEDS = (-(2**63), 2**64 - 1)
"""What torch.Generator.manual_seed takes, both included."""
ADDRESS = "://"
MOST_PICTURES = 16
"""Of one prompt. Each is as many tokens of every step as an image; no estimate counts them."""
EXACT = 2**53
"""Whole numbers below it are exact in a float."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A caption, the seed of its noise, and, for rendered scenes, what the image must show.

    ``inputs``    paths of the images that an editing pipeline starts from ({"image": ...}); several
                  references are a tuple of paths
    ``negative``  what the image must not show; None leaves that to the model's call
    """

    text: str
    seed: int
    attributes: Mapping[str, Any] | None = None
    inputs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    negative: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """``count`` prompts from row ``start`` of a file or dataset.

    ``path``    .jsonl, .json, .csv, .parquet, .yaml or .txt (one prompt a line); or on the hub:
                ``org/name[@revision]`` (with ``subset`` and ``split``), or a file in it,
                ``org/name/file.json[@revision]``
    ``column``  where the text is; of a list of captions the first one counts

    Optional columns are ``seed`` (else the row's number, so a prompt's noise never depends on
    batching), ``negative_prompt``, ``attributes``, and in local files ``image`` and ``mask_image``:
    paths, relative ones from the file's folder; ``image`` may be a list of them.
    """

    path: str
    start: int
    count: int
    column: str = "prompt"
    subset: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        for name in ("path", "column"):
            if not isinstance(given := getattr(self, name), str):
                raise ConfigError(f"prompts: {name}={given!r} is no text; write it in quotes")
        for name in ("start", "count"):
            given = getattr(self, name)
            if type(given) is not int or not 0 <= given <= sys.maxsize:
                raise ConfigError(
                    f"prompts: {name}={shortly(given)} for {self.path}; {name} is a whole number "
                    "of rows, 0 or more"
                )

        if not self.path.strip():
            raise ConfigError("prompts: path is empty; give a file, or the id of a dataset")

    def identity(self) -> dict[str, Any]:
        """Return what tells the prompts: bytes, not a path; of the hub, a commit."""
        chosen = {"column": self.column, "start": self.start, "count": self.count}
        if (place := self._on_hub()) is not None:
            part = {"subset": self.subset, "split": self.split}
            return place.identity() | ({"file": place.file} if place.file else part) | chosen
        chosen["prompts"] = file_digest(self._file())
        given = (each for prompt in self.load() for each in prompt.inputs.values())
        images = [Path(path) for each in given for path in paths_of(each)]
        shown = list(input_digests(dict.fromkeys(images)).values())
        treated = frozenset[str]().union(*map(treatment, images))
        white = {"transparent": "white"} if "white" in treated else {}
        turned = {"turned": "upright"} if "upright" in treated else {}
        return chosen | ({"images": shown} if shown else {}) | white | turned

    def load(self) -> list[Prompt]:
        """Read the prompts. Raises ConfigError if rows, or texts in them, are missing."""
        place = self._on_hub()
        stamp = place.commit if place is not None else file_digest(self._file())
        return list(_load(self, place, stamp))

    def _on_hub(self) -> HubPath | None:
        """Return the dataset that ``path`` names, unless there is such a file here."""
        if ADDRESS in self.path or os.path.lexists(resolve(self.path)):
            return None
        return hub_path(self.path, "dataset")

    def _file(self) -> Path:
        if self.subset is not None:
            raise ConfigError(
                f"subset={self.subset!r:.60} is a part of a dataset on the hub, and the prompts "
                f"come from a file, {self.path:.300}: leave subset out"
            )
        path = resolve(self.path)
        try:
            if path.is_file():  # not a folder, and not a pipe, which would never end
                path.open("rb").close()
                return path
            absent = "is an address, no file here" if ADDRESS in self.path else "does not exist"
            problem = "is no regular file" if path.exists() else absent
        except OSError as error:
            problem = f"can't be read ({error.strerror})"
        raise ConfigError(
            f"prompt file {self.path:.300} {problem}; give a JSONL file, one "
            '{"prompt": "...", "seed": 1} per line, as prompts.calibration.path=FILE (or a '
            ".csv, .parquet, .json or .txt file, or the id of a dataset on the hub)"
        )


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
    """Read a path as the user means it; ``assets://x`` is a file that ships with the package."""
    if path.startswith("assets://"):
        return Path(str(files("dirotq.assets"))) / path.removeprefix("assets://")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: there is no such home folder ({error}); write it out"
        ) from error


def shortly(value: Any) -> str:
    """Write ``value`` as Python does, cut where it is long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 2, 80, 40, 80
    try:
        return short.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to show"


@functools.lru_cache(maxsize=16)
def _load(chosen: PromptSet, place: HubPath | None, stamp: str) -> tuple[Prompt, ...]:
    """``stamp`` tells the content: a plan asks for the same prompts several times."""
    if place is not None and not place.file:
        folder, found = None, _dataset_rows(chosen, place)
    else:
        file = chosen._file() if place is None else place.download(str(place.file))
        if file.suffix.lower() not in READERS:
            raise ConfigError(
                f"{chosen.path}: prompts are read from {', '.join(READERS)} files, not from "
                f"{file.suffix or 'files without a suffix'}"
            )
        folder = file.parent if place is None else None
        found = rows(file, chosen.column, chosen.start)
    try:
        chosen_rows = list(islice(found, chosen.count))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{chosen.path} is no text in UTF-8 ({error!s:.300}): save it anew with that encoding"
        ) from error
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"{chosen.path} can't be read ({error!s:.300}). A prompt set is a .jsonl file, one "
            '{"prompt": "...", "seed": 1} per line, or .json, .csv, .parquet, .yaml or .txt'
        ) from error
    if chosen.count < 1:
        raise ConfigError(
            f"{chosen.path}: no prompts were asked for; set prompts.calibration.count and "
            "prompts.heldout.count to 1 or more"
        )
    if (held := len(chosen_rows)) < chosen.count:
        advice = f"set prompts.calibration.count or prompts.heldout.count to 1 ... {held}"
        if not held and chosen.start:
            advice = (
                "rows are counted from 0: begin at an earlier one (prompts.calibration.start or "
                "prompts.heldout.start), and ask for no more than are left"
            )
        elif not held:
            advice = "give a file with prompts"
        raise ConfigError(
            f"{chosen.path} holds {held or 'no'} prompts from row {chosen.start} on, "
            f"{chosen.count} were asked for; {advice}"
        )
    _hint(chosen, chosen_rows[0])
    numbered = enumerate(chosen_rows, chosen.start)
    return tuple(_prompt(chosen, row, number, folder) for number, row in numbered)


def _hint(chosen: PromptSet, row: Mapping[Any, Any]) -> None:
    """Say which columns are named almost like one that is looked at: they are not."""
    for name in sorted(map(str, row.keys() - {chosen.column, *USED})):
        if (close := get_close_matches(name, USED, 1, ALIKE)) and close[0] not in row:
            log.warning(
                "%s: nothing reads the column %r; is %r meant?", chosen.path, name, close[0]
            )


def _dataset_rows(chosen: PromptSet, place: HubPath) -> Iterator[Mapping[str, Any]]:
    """Rows of a whole dataset, streamed: no more is downloaded than is read."""
    import datasets

    with explained(place, "its rows"):
        try:
            part = {"split": chosen.split, "revision": place.commit, "streaming": True}
            stream = datasets.load_dataset(place.id, chosen.subset, **part)
            wanted = [chosen.column, "seed", "attributes", NEGATIVE]
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


def _prompt(chosen: PromptSet, row: Mapping[Any, Any], number: int, folder: Path | None) -> Prompt:
    where = f"{chosen.path}, row {number + 1}"
    if chosen.column not in row:
        raise ConfigError(
            f"{where}: there is no column {chosen.column!r}, there are "
            f"{shortly(sorted(map(str, row)))}; name the one with the text: "
            "prompts.calibration.column=... (and prompts.heldout.column=...)"
        )
    seed, attributes = row.get("seed"), row.get("attributes")
    negative = row.get(NEGATIVE)
    return Prompt(
        _text(row[chosen.column], where, chosen.column),
        number if seed is None else _seed(seed, where),
        attributes if isinstance(attributes, Mapping) else None,
        _pictures(row, where, folder) if folder else {},
        None if negative is None else _text([negative], where, NEGATIVE, empty=True),
    )


def _text(value: Any, where: str, column: str, *, empty: bool = False) -> str:
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not (empty or text.strip()):
        raise ConfigError(
            f"{where}: no text under {column!r}, but {shortly(text)}; remove the row, or choose "
            "others with prompts.calibration.start (or prompts.heldout.start)"
        )
    if strange := re.search("[\x00\ud800-\udfff]", text):
        raise ConfigError(
            f"{where}: the text holds {strange[0]!a}, which is no character of a text; save "
            "the file as UTF-8, or remove the row"
        )
    return text


def _seed(value: Any, where: str) -> int:
    """Return the very number that the file says: seeds have 64 bits, a float holds 53."""
    exact = type(value) is int or (
        isinstance(value, float) and value.is_integer() and abs(value) < EXACT
    )
    if not exact or not SEEDS[0] <= value <= SEEDS[1]:
        raise ConfigError(
            f"{where}: the seed {shortly(value)} is no whole number from {SEEDS[0]} to {SEEDS[1]} "
            f"(from {EXACT} on, without point or exponent); correct or remove it"
        )
    return int(value)


def paths_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the paths of one picture, or of several."""
    return (given,) if isinstance(given, str) else tuple(given)


def _pictures(row: Mapping[Any, Any], where: str, folder: Path) -> dict[str, str | tuple[str, ...]]:
    """Return the paths of a row's pictures, relative to ``folder``; each can be decoded."""
    found: dict[str, str | tuple[str, ...]] = {}
    for name in PICTURES:
        given = row.get(name)
        if isinstance(given, str):
            found[name] = _picture(given, name, where, folder)
        elif isinstance(given, list):
            if not given or not all(isinstance(path, str) for path in given):
                raise ConfigError(
                    f"{where}: the {name} {shortly(given)} is no list of paths; give one path, or "
                    'several as ["a.png", "b.png"]'
                )
            if len(given) > MOST_PICTURES:
                raise ConfigError(
                    f"{where}: {len(given)} pictures as {name}; a prompt has at most "
                    f"{MOST_PICTURES}, as every one makes each step longer. Leave some out"
                )
            found[name] = tuple(_picture(path, name, where, folder) for path in given)
        elif isinstance(given, int | float):
            raise ConfigError(f"{where}: the {name} {shortly(given)} is no path of a picture")
    return found


def _picture(given: str, name: str, where: str, folder: Path) -> str:
    if ADDRESS in given:
        raise ConfigError(
            f"{where}: the {name} {given:.300} is an address; download the picture and give its "
            "path, relative ones from the file's folder"
        )
    if not given.strip():
        raise ConfigError(f"{where}: the {name} is empty; give the path of a picture")
    picture = folder / resolve(given)
    if not os.path.isfile(picture):  # noqa: PTH113 (Path's raises for odd names)
        found = "is a folder" if os.path.isdir(picture) else "does not exist"  # noqa: PTH112
        raise ConfigError(
            f"{where}: the {name} {picture!s:.300} {found}; give the path of a picture, relative "
            "ones from the file's folder"
        )
    try:
        check_picture(picture)
    except ConfigError as error:
        raise ConfigError(f"{where}: the {name} {error}") from error
    return str(picture)


def _plain(prompt: Prompt) -> tuple[str, tuple[tuple[str, tuple[str, ...]], ...]]:
    pictures = ((name, paths_of(given)) for name, given in prompt.inputs.items())
    return " ".join(prompt.text.split()).casefold(), tuple(sorted(pictures))
