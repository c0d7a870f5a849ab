"""The documents name tests that exist, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("examples", "simpo_megatron", "tests", "tools")
READMES = [ROOT / "README.md", *sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))]


def named_tests(text: str) -> list[tuple[str, str | None]]:
    """(file, test or None) of every `file`, `file::test` and `::test` in a text; `::test` is of the file before it."""
    found: list[tuple[str, str | None]] = []
    file = ""
    for name, test in re.findall(r"`((?:[\w/]+\.py)?)(?:::(test_\w+)[^`]*)?`", text):
        file = name or file
        if name or test:
            found.append((file, test or None))
    return found


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown text."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+)$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def relative_links(text: str) -> list[str]:
    """The targets of the links of a Markdown text that lead into the repository."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^()\s]+)\)", without_code) if not re.match(r"\w+:", link)]


def test_every_named_test_exists() -> None:
    folder = ROOT / "tests"
    named = named_tests((folder / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    missing = [
        (file, test)
        for file, test in named
        if not (folder / file).is_file()
        or (test and not re.search(rf"^def {test}\(", (folder / file).read_text(encoding="utf-8"), re.MULTILINE))
    ]
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(readme: Path) -> None:
    broken = []
    for link in relative_links(readme.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = readme.parent / path if path else readme
        if not target.exists() or (anchor and anchor not in slugs(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("folder", ["examples", "simpo_megatron", "tools"])
def test_every_file_is_named_in_the_readme_of_its_folder(folder: str) -> None:
    """The modules, programs and folders that stand directly in the folder."""
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    found = {path.name for path in (ROOT / folder).iterdir() if path.is_dir() or path.suffix in (".py", ".sh")}
    found -= {"__init__.py", "__pycache__"}
    assert not {name for name in found if not re.search(rf"(?<![\w.]){re.escape(name)}", text)}


def test_the_quick_tests_exist(request: pytest.FixtureRequest) -> None:
    """Pytest refuses the whole list for one name that is not there. Only files that run now can be looked into."""
    known = {name for item in request.session.items for name in (item.nodeid, item.nodeid.partition("[")[0])}
    files = {name.partition("::")[0] for name in known}
    for line in (ROOT / "tests" / "quick.txt").read_text().splitlines():
        file = line.partition("::")[0]
        assert (ROOT / file).exists(), line
        assert line == file or file not in files or line in known, line
