"""What code and documents cite is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "docs", "dspark_jax", "launch", "notebooks", "tests")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def cited(text: str) -> set[int]:
    """Numbers of the traps that a text cites: "trap 3", "traps 25, 27", "traps 21 to 23"."""
    found: set[int] = set()
    for numbers in re.findall(r"\btraps? (\d+(?:(?:, | and | to )\d+)*)", text, re.IGNORECASE):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", numbers):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_every_trap_that_is_cited_has_an_entry():
    known = {int(number) for number in re.findall(r"^### (\d+)\. ", (ROOT / "docs" / "traps.md").read_text(), re.M)}
    files = [file for name in ("dspark_jax", "tests") for file in (ROOT / name).rglob("*.py")]
    citing = {str(file.relative_to(ROOT)): cited(file.read_text()) for file in files if file != Path(__file__)}
    assert len(set().union(*citing.values())) > 20, "the citations are not found any more"
    assert not {name: numbers - known for name, numbers in citing.items() if numbers - known}


def test_lists_of_traps_are_read():
    assert cited("(traps 25, 27); traps 21 to 23: Trap 1 and traps 3 and 5") == {25, 27, 21, 22, 23, 1, 3, 5}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    """Links, and paths in backticks, which may leave out the folders that they begin with."""
    text = page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in target]
    assert not [target for target in links if not (page.parent / target).exists()]
    there = "".join(f"/{file.relative_to(ROOT)}\n" for name in FOLDERS for file in (ROOT / name).rglob("*"))
    paths = re.findall(r"`([\w./-]+\.(?:py|md|ipynb|sh|yaml))`", text)
    assert not [path for path in paths if not (ROOT / path).exists() and f"/{path}\n" not in there]


def test_the_readme_stays_short():
    """Details belong into docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
