"""A page of ours as a browser would read it, as far as a parser can tell."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

from PIL import Image

LINKS = ("src", "href", "srcset", "action", "data", "poster", "formaction", "background")


class Page(HTMLParser):
    """``tags``: every start tag with its attributes; ``text`` without scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.scripts, self.styles = html, [], [], []
        self._open: list[str] = []
        self._text: list[str] = []
        self._within_word = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = [*self._open, tag] if tag in ("script", "style") else self._open
        self._within_word = tag == "wbr"

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._open.pop()
        self._within_word = False

    def handle_data(self, data):
        place = {"script": self.scripts, "style": self.styles}
        pieces = place.get(self._open[-1] if self._open else "", self._text)
        if self._within_word:
            pieces[-1] += data
        else:
            pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._text).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self) -> list[Image.Image]:
        data = [image["src"].partition("base64,")[2] for image in self.all("img")]
        return [Image.open(io.BytesIO(base64.b64decode(one))) for one in data]


def refuse_faults(page: Page) -> None:
    """What holds for every page: nothing fetched, nothing injected, every image described."""
    links = [a[name] for _, a in page.tags for name in LINKS if name in a]
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttp", page.html.replace("data:", ""))
    [policy] = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy
    for script in page.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy  # else the browser runs nothing
    assert len(page.scripts) <= 1
    assert not [a for _, a in page.tags for name in a if name.startswith("on")]
    assert all(image.get("alt") for image in page.all("img"))
    assert all(svg.get("aria-label") for svg in page.all("svg"))
    assert all(
        field.get("aria-label") or field["type"] == "checkbox" for field in page.all("input")
    )
    assert "width=device-width" in page.html
    [style] = page.styles
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    stack = []  # what is opened is closed, in order
    for end, tag in re.findall(r"<(/?)(table|tr|td|div|figure|details|ul|svg|h1|h2)\b", page.html):
        if not end:
            stack.append(tag)
        else:
            assert stack.pop() == tag
    assert not stack
