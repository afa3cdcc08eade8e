"""Prompt files of every kind, well-formed ones and others."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from PIL import Image

from dirotq.sources.prompts import PromptSet

from .values import TEXTS, VALUES, as_json, damaged, edited

ROWS = [
    {"prompt": "a cat", "seed": 7, "attributes": {"objects": [{"shape": "star"}], "x": None}},
    {"prompt": "a dog", "seed": 2**64 - 1, "image": "in.png"},
    {"prompt": ["one", "two"], "caption": "ü"},
]
YAML = (
    "a: &a {prompt: x, seed: 1}\nb: {<<: *a, seed: 2}\n", "- a\n- b\n", "- !!int ''\n",
    "- !!set {a}\n", "- !!binary x\n", "- &r [*r]\n", "!!omap [a: b]\n", "- 2001-13-45\n",
    "- !!python/object:os.system x\n", "? [a]\n: b\n", "- 0x" + "f" * 5000 + "\n", "- 1:30\n",
)  # fmt: skip


def _lines(rows: Any) -> bytes:
    return "\n".join(map(as_json, rows if isinstance(rows, list) else [rows])).encode()


def _csv(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode(errors="surrogatepass")


def _parquet(columns: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), out)
    except (pyarrow.ArrowException, UnicodeError, OverflowError):
        return b"PAR1"  # no such table
    return out.getvalue()


CELLS = TEXTS | st.sampled_from(("prompt", "seed", "image", "in.png", "7", "7.0", "a, b"))
SAME_LENGTH = st.integers(0, 3).flatmap(
    lambda n: st.dictionaries(
        st.sampled_from(("prompt", "seed", "attributes", "image", "")),
        st.one_of(
            st.lists(VALUES, min_size=n, max_size=n),
            st.lists(st.integers(0, 2**64 - 1), min_size=n, max_size=n),
            st.lists(TEXTS, min_size=n, max_size=n),
        ),
    )
)
CONTENTS: Mapping[str, st.SearchStrategy[bytes]] = {
    "jsonl": edited(ROWS).map(_lines),
    "json": st.one_of(edited(ROWS), edited({"a": ROWS[0], "b": "text"})).map(
        lambda value: as_json(value).encode()
    ),
    "yaml": st.one_of(
        st.sampled_from(YAML).map(str.encode), edited(ROWS).map(lambda v: json.dumps(v).encode())
    ),
    "csv": st.lists(st.lists(CELLS, max_size=3), max_size=4).map(
        lambda rows: _csv([["prompt", "seed", "image"], *rows])
    ),
    "txt": st.lists(TEXTS).map(lambda t: "\n".join(t).encode(errors="surrogatepass")),
    "parquet": SAME_LENGTH.map(_parquet),
}


def prompt_reader(suffix: str) -> tuple[st.SearchStrategy[Any], Callable[[Path, Any], Any]]:
    """Content, rows asked for and a column, for files that end in ``suffix``."""

    def read(folder: Path, example: tuple[bytes, int, int, str]) -> None:
        content, start, count, column = example
        file = folder / f"set[1] ü.{suffix}"
        file.write_bytes(content)
        Image.new("RGB", (16, 16)).save(folder / "in.png")
        chosen = PromptSet(path=str(file), start=start, count=count, column=column)
        for prompt in chosen.load():
            assert len(prompt.text.encode()) > 0, "texts are texts"
            assert -(2**63) <= prompt.seed < 2**64
        chosen.identity()

    examples = st.tuples(
        CONTENTS[suffix].flatmap(damaged) | CONTENTS[suffix] | st.binary(max_size=40),
        st.sampled_from((0, 0, 0, 1, 2**70)),
        st.integers(0, 3),
        st.sampled_from(("prompt", "prompt", "caption", "seed", "")),
    )
    return examples, read
