"""Rows of a prompt file, read as they stand (no guess at a column's type), and their pictures.

What can't be read is a ValueError that names the row; dirotq/sources/prompts.py says what to do
about it.
"""

import csv
import functools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from dirotq.errors import ConfigError
from dirotq.files.digest import Stamp, stamp
from dirotq.models.pipeline_images import PICTURES

if TYPE_CHECKING:
    from PIL.Image import Image

NEGATIVE = "negative_prompt"
USED = ("seed", "attributes", NEGATIVE, *PICTURES)
"""Columns that are looked at, beside the one with the text."""
LINE = 1 << 24
"""Characters that a line may have."""
LEAST_SIDE, MOST_NARROW = 16, 32
"""Pixels of a picture's shorter side, and how often it may go into the longer one: pipelines round
both to patches of up to 32 pixels, and a side of none ends in a division by zero."""
MOST_PIXELS = 1 << 26
"""Of a picture, 64 megapixels. Pipelines scale pictures down to one or two of them; each prompt
decodes its own anew."""
_TOO_LARGE = (
    f"a picture has at most {MOST_PIXELS} pixels (8192 x 8192): models scale it down anyway. "
    "Save a smaller copy"
)
DEEP = re.compile(r"[A-Z]+;16\w*")
ORIENTATION, TURNED = 0x0112, range(2, 9)
"""EXIF's tag, and its values of pictures that don't lie in the file as they are looked at."""
WHOLE = 1 << 28
"""Bytes that a file may have that is read at once."""
MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
     "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip
"""Cells of a CSV file that say "nothing here", as pandas writes and reads them."""
_WHOLE_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,40})(?:\.0*)?\s*")

Row = Mapping[Any, Any]


def rows(file: Path, column: str, start: int) -> Iterator[Row]:
    """Yield the rows of ``file`` from number ``start`` on; bare texts come under ``column``.

    Raises ValueError or OSError for what can't be read; KeyError for an unknown suffix.
    """
    return READERS[file.suffix.lower()](file, column, start)


def open_picture(path: str | Path) -> "Image":
    """Decode a whole picture to RGB: upright, what is transparent on white.

    Raises ConfigError if it is missing, truncated or no picture, of more than 8 bits a channel
    (Pillow would cut them off), one of several in a file, of more than MOST_PIXELS, or too small or
    narrow for a model's patches.
    """
    from PIL import Image, ImageOps

    try:
        with _opened(path) as opened:
            _refuse_kind(path, opened)
            upright = ImageOps.exif_transpose(opened)
            if not opened.has_transparency_data:
                return upright.convert("RGB")
            colours = upright.convert("RGBA")
            white = Image.new("RGBA", colours.size, "white")
            return Image.alpha_composite(white, colours).convert("RGB")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        found = "is a folder" if isinstance(error, IsADirectoryError) else "does not exist"
        raise ConfigError(f"{path} {found}; give the path of a picture") from error
    # Beside OSError: what Pillow's decoders raise for damaged files.
    except (
        OSError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError,
        SyntaxError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise ConfigError(
            f"{path} can't be read as a picture ({type(error).__name__}: {error}); save it anew as "
            "PNG or JPEG, or name another one"
        ) from error


def treatment(path: Path) -> frozenset[str]:
    """Return what :func:`open_picture` does to a picture beside decoding it: ``white`` behind what
    is transparent, ``upright`` where a camera says how it was held.
    """
    from PIL import Image

    with Image.open(path) as opened:
        turned = opened.getexif().get(ORIENTATION, 1) in TURNED
        done = {"white": opened.has_transparency_data, "upright": turned}
    return frozenset(name for name, does in done.items() if does)


@contextmanager
def _opened(path: str | Path) -> "Iterator[Image]":
    """Open a picture, its header alone. Pillow's own limit is out of the way: ours comes after."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as opened:
                yield opened
        except Image.DecompressionBombError as error:
            raise ConfigError(f"{path} is too large: {_TOO_LARGE}") from error


def _refuse_kind(path: str | Path, opened: "Image") -> None:
    mode, size = opened.mode, opened.size
    # What Pillow reads as 8 bits has its real form among the arguments of its decoder: RGB;16B.
    deep = [mode, *DEEP.findall(str(getattr(opened, "tile", "")))]
    if mode == "F" or mode.startswith("I") or len(deep) > 1:
        raise ConfigError(
            f"{path} has more than 8 bits a channel (Pillow's mode {deep[-1]}), which would be cut "
            "off; save it with 8 bits a channel, as PNG or JPEG"
        )
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":  # of a camera: the photo, then its previews
        raise ConfigError(
            f"{path} holds {frames} pictures, and a model starts from one; save the one that is "
            "meant as PNG or JPEG"
        )
    if size[0] * size[1] > MOST_PIXELS:
        raise ConfigError(f"{path} is {size[0]} x {size[1]} pixels, and {_TOO_LARGE}")
    short, long = sorted(size)
    if short < LEAST_SIDE or long > MOST_NARROW * short:
        raise ConfigError(
            f"{path} is {size[0]} x {size[1]} pixels; a picture has sides of at least "
            f"{LEAST_SIDE} pixels, the longer one up to {MOST_NARROW} times the shorter. Give "
            "another picture, or a cut of it"
        )


def check_picture(path: str | Path) -> None:
    """Raise what :func:`open_picture` raises; decoded again only if the file changed."""
    try:
        seen = stamp(Path(path))
    except OSError as error:
        raise ConfigError(f"{path} can't be read ({error.strerror})") from error
    _check(str(path), seen)


def _json_lines(file: Path, column: str, start: int) -> Iterator[Row]:
    with _text(file) as opened:
        if _is_array(opened):
            yield from _json(file, column, start)
            return
        numbered = enumerate(line for line in _lines(opened) if line.strip())
        for number, line in islice(numbered, start, None):
            yield _row(_parsed(line, f"row {number + 1}: "), column)


def _json(file: Path, column: str, start: int) -> Iterator[Row]:
    yield from _listed(_parsed(_all(file)), column, start)


def _yaml(file: Path, column: str, start: int) -> Iterator[Row]:
    try:
        content = yaml.load(_all(file), _Strict)
    # Beside its own errors: what PyYAML's constructors raise for tags that don't fit the value.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    yield from _listed(content, column, start)


def _csv(file: Path, column: str, start: int) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        try:
            cells = (
                row
                for row in csv.reader(_lines(opened), strict=True)
                if row and not (len(row) == 1 and row[0].isspace())
            )
            names = next(cells, [])
            for name in (column, *USED):
                if names.count(name) > 1:
                    raise ValueError(f"the column {name!r} stands twice in its header")
            for number, row in islice(enumerate(cells), start, None):
                if len(row) > len(names):
                    raise ValueError(
                        f"row {number + 1}: {len(row)} cells below a header of {len(names)}; a "
                        "text with commas needs quotes"
                    )
                yield _typed(dict(zip(names, row)) | dict.fromkeys(names[len(row) :]))
        except csv.Error as error:
            raise ValueError(str(error)) from error


def _parquet(file: Path, column: str, start: int) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            wanted = [name for name in schema.names if name in (column, *USED)]
            if len(set(wanted)) < len(wanted):
                raise ValueError(f"a column stands twice: {wanted}")
            if column not in wanted:
                yield dict.fromkeys(schema.names)  # the caller says what there is
                return
            for batch in opened.iter_batches(256, columns=wanted, use_threads=False):
                yield from batch.slice(start).to_pylist()
                start = max(start - len(batch), 0)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(str(error)) from error


def _plain_text(file: Path, column: str, start: int) -> Iterator[Row]:
    with _text(file) as opened:
        for line in islice(_lines(opened), start, None):
            yield {column: line.removesuffix("\n")}


READERS: Mapping[str, Callable[[Path, str, int], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _plain_text,
    # A list of rows, or {id: row} or {id: text}, as benchmarks publish their prompts.
    ".json": _json,
    ".yaml": _yaml,
    ".yml": _yaml,
}


def _text(file: Path) -> TextIO:
    return file.open(encoding="utf-8-sig")


def _lines(opened: TextIO) -> Iterator[str]:
    while line := opened.readline(LINE):
        if len(line) == LINE:
            raise ValueError(f"a line has more than {LINE} characters")
        yield line


def _is_array(opened: TextIO) -> bool:
    """Tell whether it is one JSON array, whatever its suffix; the file is at its start again."""
    head = opened.read(4096).lstrip()
    opened.seek(0)
    return head.startswith("[")


def _all(file: Path) -> str:
    if (size := file.stat().st_size) > WHOLE:
        raise ValueError(
            f"it has {size} bytes, files read at once may have {WHOLE}; write it as .jsonl"
        )
    return file.read_text(encoding="utf-8-sig")


def _parsed(text: str, where: str = "") -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice(key for key, _ in pairs)!r} stands twice in one object")
    return found


def _twice(keys: Iterable[Any]) -> Any:
    return Counter(keys).most_common(1)[0][0]


def _listed(content: Any, column: str, start: int) -> Iterator[Row]:
    found: Iterable[Any] = content.values() if isinstance(content, Mapping) else content or ()
    if not isinstance(content, Mapping | list | None):
        raise ValueError("it is neither a list nor a mapping of rows")
    return (_row(row, column) for row in islice(found, start, None))


def _row(row: Any, column: str) -> Row:
    return row if isinstance(row, Mapping) else {column: row}


def _typed(row: dict[str, str | None]) -> Row:
    """Type the cells of a CSV row: text, nothing, and a seed written as a whole number."""
    found: dict[str, Any] = {name: None if cell in MISSING else cell for name, cell in row.items()}
    if isinstance(seed := found.get("seed"), str) and (number := _WHOLE_NUMBER.fullmatch(seed)):
        found["seed"] = int(number[1])
    return found


class _Strict(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: PyYAML keeps the last and says nothing."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) not in self._checked:  # an anchor's mapping comes again, with what it merged
            self._checked.add(id(node))
            keys = [(k.tag, k.value) for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_twice(keys)[1]!r} stands twice", node.start_mark
                )
        super().flatten_mapping(node)


@functools.lru_cache(maxsize=4096)
def _check(path: str, _: Stamp) -> None:
    open_picture(path)
