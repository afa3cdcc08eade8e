"""Markdown is readable as it stands: wrapped lines, short tables, links that lead somewhere."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

COLUMNS = 100
TABLE_COLUMNS = 150
"""Of a table row that a person wrote. A cell that needs more is a paragraph below the table."""
README_BYTES = 9_000
GLOSSARY_LINES = 40
FOLDERS = ("assets", "benchmarks", "conf", "dirotq", "docs", "kernels", "models", "pipeline")
FOLDERS += ("stages", "tests", "examples")
FILE = r"[\w.<>{},*/-]+\.(?:py|yaml|j2|md|toml)\b"


def pages(root: Path) -> list[Path]:
    """Every Markdown file of the repository; artifacts/ holds one of ours and what users make."""
    found = [*root.glob("*.md"), *root.glob("artifacts/*.md")]
    return sorted([*found, *(page for name in FOLDERS for page in (root / name).rglob("*.md"))])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "page" in metafunc.fixturenames:
        root = metafunc.config.rootpath
        found = pages(root)
        metafunc.parametrize("page", found, ids=[str(page.relative_to(root)) for page in found])


def too_long(text: str) -> Iterator[str]:
    """Lines over the limit, but for code, rows of generated tables and what has no place to break
    (a link alone on its line)."""
    code = generated = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            code = not code
        if line.startswith(("<!-- begin", "<!-- end")):
            generated = line.startswith("<!-- begin")
        row = line.lstrip().startswith("|")
        breaks = len(re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", line).split()) > 1
        limit = TABLE_COLUMNS if row else COLUMNS
        if len(line) > limit and breaks and not code and not (row and generated):
            yield line


def test_lines_are_wrapped(page):
    assert list(too_long(page.read_text())) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("word " * 20, 0),  # 100 columns
        ("word " * 20 + "x", 1),
        ("- https://host/" + "x" * 100, 0),
        ("see https://host/" + "x" * 100, 1),
        ("```\n" + "word " * 40 + "\n```", 0),
        ("```\ncode\n```\n" + "word " * 40, 1),
        ("| " + "x " * 73 + "|", 0),  # 149 columns
        ("| " + "x " * 74 + "|", 1),
        ("<!-- begin: t -->\n| " + "x " * 99 + "|\n<!-- end: t -->", 0),
        ("<!-- begin: t -->\n" + "word " * 40 + "\n<!-- end: t -->", 1),
        ("<!-- begin: t -->\n<!-- end: t -->\n| " + "x " * 99 + "|", 1),
    ],
)
def test_what_counts_as_too_long(text, found):
    assert len(list(too_long(text))) == found


def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def missing(text: str, files: Iterable[str]) -> list[str]:
    """Return the paths in backticks that none of ``files`` has.

    ``<name>`` and ``*`` stand for any name, ``{a,b}`` for each. A path may leave out its first
    folders, as ``test_dag.py`` does.
    """
    named = [path for code in re.findall(r"`([^`\n]+)`", text) for path in re.findall(FILE, code)]
    found = []
    for path in named:
        before, brace, rest = path.partition("{")
        inside, _, after = rest.partition("}")
        for choice in inside.split(",") if brace else [""]:
            pattern = re.sub(r"<\w+>", "*", before + choice + after).removeprefix("../")
            if not any(fnmatch(name, pattern) or fnmatch(name, f"*/{pattern}") for name in files):
                found.append(path)
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`stages/gptq.py`", []),
        ("`gptq.py` and `make x`", []),
        ("`stages/<stage>.py`, `*/gptq.py`", []),
        ("`stages/{gptq,pack}.py`", []),
        ("`stages/{gptq,rank}.py`", ["stages/{gptq,rank}.py"]),
        ("`tq.py`", ["tq.py"]),
        ("`kernels/gptq.py`", ["kernels/gptq.py"]),
        ("stages/old.py", []),
    ],
)
def test_what_counts_as_missing(text, found):
    assert missing(text, ["stages/gptq.py", "stages/pack.py"]) == found


def test_files_that_are_named_exist(root):
    """Records of decisions and of changes name files as they were then, so they are left out."""
    files = [*root.glob("*.*"), *(file for name in FOLDERS for file in (root / name).rglob("*.*"))]
    names = [str(file.relative_to(root)) for file in files]
    kept = [p for p in pages(root) if p.parent.name != "adr" and p.name != "CHANGELOG.md"]
    assert [(page, path) for page in kept for path in missing(page.read_text(), names)] == []


def test_the_readme_is_short_and_shows_the_map_of_the_stages(root):
    text = (root / "README.md").read_text()
    assert len(text.encode()) <= README_BYTES
    assert "pip install" in text
    assert "\nmake compress" in text
    assert (root / "conf" / "pipeline" / "default.yaml").read_text() in text


def test_the_glossary_fits_a_screen(root):
    text = (root / "docs" / "method.md").read_text()
    _, found, rest = text.partition("\n## Glossary\n")
    assert found
    assert len(rest.partition("\n## ")[0].strip().splitlines()) <= GLOSSARY_LINES
