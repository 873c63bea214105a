"""The page as a document: self-contained, and its parts fit together."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from dspark_jax.serve.document import SCRIPTS, document, parts, policy

NAMESPACE = "http://www.w3.org/2000/svg"  # a name that is never fetched


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of script and style elements."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inside.append((self.tags[-1][0], data))


@pytest.fixture(scope="module")
def page() -> Elements:
    return Elements(document())


def test_nothing_is_fetched_from_elsewhere(page: Elements) -> None:
    text = document().replace(NAMESPACE, "")
    assert not re.findall(r"(?:https?:|wss?:|ftp:)?//[a-z0-9]", re.sub(r"^\s*// .*$", "", text, flags=re.M), re.I)
    assert not re.search(r"@import|url\(|<(?:iframe|object|embed|base)\b", text, re.I)
    assert not [tag for tag, given in page.tags if "src" in given or tag == "img"]
    links = [given["href"] for _, given in page.tags if given.get("href")]
    assert all(link and (link.startswith("#") or link == "data:,") for link in links)
    assert not [given for _, given in page.tags if "style" in given or any(name.startswith("on") for name in given)]


def test_the_policy_allows_what_is_there_and_no_more(page: Elements) -> None:
    (given,) = [given for tag, given in page.tags if given.get("http-equiv") == "Content-Security-Policy"]
    assert given["content"] == policy()
    script = next(text for tag, text in page.inside if tag == "script" and "class Player" in text)
    style = next(text for tag, text in page.inside if tag == "style")
    for kind, text in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy()
    assert "default-src 'none'" in policy() and "connect-src 'self'" in policy() and "unsafe" not in policy()


def test_a_recording_cannot_leave_its_element() -> None:
    recording = {"about": "</script><script>alert(1)</script><!-- @script@ @recording@", "runs": ["é"]}
    found = [text for tag, text in Elements(document(recording)).inside if tag == "script"]
    assert json.loads(found[0]) == recording and len(found) == 2
    assert json.loads([text for tag, text in Elements(document()).inside if tag == "script"][0]) is None


def test_every_control_has_a_name(page: Elements) -> None:
    labelled = {given["for"] for tag, given in page.tags if tag == "label"}
    for tag, given in page.tags:
        if tag in ("input", "select", "textarea", "progress"):
            assert given["id"] in labelled or given.get("aria-label"), given
        if tag == "svg":
            assert given.get("role") == "img" and given.get("aria-label")
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(ids) == len(set(ids))
    assert [given["lang"] for tag, given in page.tags if tag == "html"] == ["en"]


def test_the_script_finds_what_it_looks_for(page: Elements) -> None:
    _, script, style = parts()
    ids = {given["id"] for _, given in page.tags if "id" in given}
    asked = set(re.findall(r'byId\("([\w-]+)"\)', script))
    assert asked and asked <= ids
    hints = {given["data-hint"] for _, given in page.tags if "data-hint" in given}
    assert hints == set(
        re.findall(r"^  (\w+): \"", script[script.index("const HINTS") : script.index("const SCHEDULERS")], re.M)
    )
    for fate in re.findall(r"^  (\w+): \{sign:", script, re.M):
        assert f".chip.{fate}" in style
    assert len(SCRIPTS) == len(set(SCRIPTS))
