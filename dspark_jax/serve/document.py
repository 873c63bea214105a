"""The live page as one self-contained document, put together from the files in `page/`.

Its policy names the one script and the one style sheet by their hashes, so nothing else runs, and nothing is fetched
from anywhere but the server that has sent it.
"""

import base64
import functools
import hashlib
import json
from importlib import resources
from typing import Any

SCRIPTS = ("sources.js", "player.js", "draw.js", "charts.js", "hints.js", "page.js")
"""One script, in this order."""


@functools.cache
def parts() -> tuple[str, str, str]:
    """(the document with its holes, script, style)."""
    folder = resources.files("dspark_jax.serve") / "page"

    def read(name: str) -> str:
        return (folder / name).read_text("utf-8")

    script = '"use strict";\n' + "\n".join(read(name).removeprefix('"use strict";\n') for name in SCRIPTS)
    return read("index.html"), script, read("page.css")


def policy() -> str:
    """The Content-Security-Policy of the document."""
    _, script, style = parts()
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def document(recording: Any = None) -> str:
    """The page; with a recording, it needs no server and works from a file."""
    page, script, style = parts()
    # In a script element, only `<` could end it or begin a comment.
    content = json.dumps(recording, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    for name, value in {"policy": policy(), "style": style, "script": script, "recording": content}.items():
        page = page.replace(f"@{name}@", value, 1)
    return page


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
