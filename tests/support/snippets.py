"""Blocks of commands and Python in the documents, and which of them tests run.

A block is run (tests/policy/test_snippets.py) unless the line above it says why not:
``<!-- not run: gpu -->``, with one or several words of ``REASONS``.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REASONS = {
    "gpu": "needs a GPU",
    "hub": "needs the network: a model, a data set or an account of the Hub",
    "install": "changes what is installed",
    "minutes": "takes minutes",
    "program": "needs another program or server",
    "yours": "needs a file that only the reader has",
}
"""Why a block is not run."""

RUN = ("bash", "python")
SHOWN = ("", "text", "yaml")
"""Languages of what is only looked at: output, settings."""

FENCE = re.compile(r"^\s*```(.*)$")
MARK = re.compile(r"^\s*<!-- not run: (.*) -->$")
INDENTED = re.compile(r"^ {4,}(?:\$ )?(?:make|dirotq|pip|python\d?|import|from) ?\S*(?: |$)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    ``line``     where its code begins, from 1
    ``reasons``  why it is not run; none: it is
    """

    language: str
    code: str
    line: int
    reasons: tuple[str, ...] = ()


def documents(root: Path) -> list[str]:
    """Names of the documents whose commands are tested; records of decisions (adr/) are left out.

    root  folder of the checkout
    """
    found = [root / "README.md", root / "CONTRIBUTING.md", root / "artifacts" / "README.md"]
    return [str(path.relative_to(root)) for path in [*found, *sorted((root / "docs").glob("*.md"))]]


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown text. Raises ValueError for one that has no end."""
    lines = text.splitlines()
    above = ""
    rows = iter(enumerate(lines, 2))
    for first, line in rows:
        if not (fence := FENCE.match(line)):
            above = line or above
            continue
        code = []
        for _, inside in rows:
            if FENCE.match(inside):
                break
            code.append(inside)
        else:
            raise ValueError(f"the block at line {first - 1} has no end")
        mark = MARK.match(above)
        reasons = tuple(word.strip() for word in mark[1].split(",")) if mark else ()
        yield Block(fence[1].strip(), "\n".join(code), first, reasons)
        above = ""


def faults(text: str) -> list[str]:
    """Say what is wrong with the blocks of a text: languages, reasons, commands without a fence."""
    found = []
    for block in blocks(text):
        if block.language not in RUN + SHOWN:
            found.append(f"line {block.line}: {block.language!r} is none of {RUN + SHOWN}")
        if unknown := set(block.reasons) - set(REASONS):
            found.append(f"line {block.line}: {sorted(unknown)} are none of {sorted(REASONS)}")
        if block.reasons and block.language not in RUN:
            found.append(f"line {block.line}: a block that nobody runs needs no reason")
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced and INDENTED.match(line):
            found.append(f"line {number}: a command without ```bash or ```python: {line.strip()}")
    return found


def commands(code: str) -> list[str]:
    """Return the commands of a bash block: lines joined at backslashes, comments taken off."""
    lines = code.replace("\\\n", " ").splitlines()
    found = (re.split(r"(?:^|\s\s)#", line)[0].removeprefix("$ ").strip() for line in lines)
    return [command for command in found if command]
