"""The documentation's site has every page, and loads nothing from other hosts."""

import re
from collections.abc import Iterator

import pytest
import yaml

USERS = (
    "index", "finetune", "lora", "own", "choose", "low-vram", "sweeps", "export", "formats",
    "families", "faq", "limits",
)  # fmt: skip
"""Pages that answer a user's question with a command."""


def listed(nav: object) -> Iterator[str]:
    """Pages of a `nav`, at any depth."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict | list):
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from listed(part)


@pytest.fixture(scope="module")
def site(root):
    return yaml.safe_load((root / "mkdocs.yml").read_text())


def test_every_page_is_in_the_navigation_once(site, root):
    docs = root / "docs"
    pages = sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))
    assert sorted(listed(site["nav"])) == pages, "add the page to nav in mkdocs.yml"


def test_pages_are_found_at_any_depth():
    assert list(listed([{"A": "a.md"}, {"B": [{"C": "c.md"}, "d.md"]}])) == ["a.md", "c.md", "d.md"]


def misread(text: str) -> list[int]:
    """Return numbers of lines that the site shows otherwise than other readers of Markdown do: a
    list right below a paragraph, and what follows an empty line in a list by less than 4 spaces."""
    found, above, fenced = [], "", False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        item = re.match(r"(?:[-*]|\d+\.) ", line)
        beside = above.startswith(" ") or re.match(r"(?:[-*]|\d+\.) ", above)
        glued = item and above.strip() and not beside
        shallow = re.match(r" {1,3}\S", line) and not above.strip()
        if not fenced and (glued or shallow):
            found.append(number)
        above = line
    return found


def test_pages_read_alike_here_and_elsewhere(root):
    pages = (root / "docs").rglob("*.md")
    assert {str(page): found for page in pages if (found := misread(page.read_text()))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Text.\n\n- a\n  b\n- c", []),
        ("Text.\n- a", [2]),
        ("- a\n\n  b", [3]),
        ("- a\n\n    b\n- c", []),
        ("```\nx\n- a\n```", []),
    ],
)
def test_what_is_misread(text, found):
    assert misread(text) == found


def test_the_site_needs_no_other_host(site):
    assert site["strict"] is True
    assert site["theme"]["font"] is False
    assert site["plugins"] == ["search"]
    assert not {"analytics", "homepage", "social"} & set(site["extra"])
    assert not {"extra_javascript", "extra_css", "repo_url"} & set(site)


def test_the_site_is_built_by_check_and_not_committed(root):
    makefile = (root / "Makefile").read_text()
    assert "\ncheck: $(STAMP) .links docs " in makefile
    assert "mkdocs build --strict\n" in makefile  # with --quiet it counts no warnings
    assert "/site/" in (root / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("page", USERS)
def test_a_page_for_users_begins_with_its_command(page, root):
    lines = (root / "docs" / f"{page}.md").read_text().splitlines()
    assert lines[0].startswith("# ") and lines[2] in ("```bash", "```python")
