"""The documentation runs: every Python block of every page, in order, and every link leads somewhere."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import attrreg
import benchmarks.__main__ as benchmarks
from attrreg.bench import report
from benchmarks import check, evidence, survey

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.exists()]
LANGUAGES = {"python", "text", "console", ""}  # what is Python runs; there is no mark for Python that does not

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAVIGATION = re.compile(r":\s*(\S+\.md)\s*$", re.MULTILINE)


class Block(NamedTuple):
    language: str
    line: int  # of its first line of code
    code: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; a fence inside a list item is indented, and so is its code."""
    found: list[Block] = []
    lines: list[str] | None = None
    language, first, indent = "", 0, 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = line.lstrip().startswith("```")
        if lines is None and fence:
            lines, language, first = [], line.strip().removeprefix("```"), number + 1
            indent = len(line) - len(line.lstrip())
        elif lines is not None and fence:
            found.append(Block(language, first, "\n".join(lines)))
            lines = None
        elif lines is not None:
            lines.append(line[indent:])
    assert lines is None, f"{page.name}: the block that starts at line {first} is never closed"
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^[ ]*```.*?^[ ]*```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")  # by Lightning's own loops, as are the next two
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"docs_{page.stem}")  # registered, because dataclasses and pickle look their module up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}, line {block.line}: {block.language!r} is not one of {sorted(LANGUAGES)}"
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.code  # so that a traceback shows the page's own lines
            exec(compile(code, str(page), "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}, but {target.name} has only {sorted(anchors(target))}"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(NAVIGATION.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_pages_show_the_records() -> None:
    performance, readme = (page.read_text(encoding="utf-8") for page in (benchmarks.PAGE, benchmarks.README))
    records = [numbers.stem for numbers in check.results("").parent.glob("*.json")]
    surveys = [section for section in records if section.startswith("survey")]
    assert benchmarks.SUMMARIZED in records and {"survey", "survey-channels-last"} <= {*surveys}
    for section in {*records} - {*surveys}:
        record = report.load(check.results(section))
        assert report.markdown(record) in performance and check.missed(record) in performance, section
        assert section != benchmarks.SUMMARIZED or all(part in readme for part in benchmarks.summary(record))
    for section in surveys:
        record = report.load(check.results(section))
        assert survey.table(record) in performance and survey.missed(record) in performance, section


def test_the_page_of_the_evidence_shows_its_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / evidence.PAGE.name
    page.write_text(shown := evidence.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(evidence, "PAGE", page)
    evidence.write_page()
    assert page.read_text(encoding="utf-8") == shown and page.with_suffix(".png").stat().st_size > 10_000


def referenced() -> list[str]:
    """What the page of the API describes."""
    return re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("name", referenced())
def test_what_the_api_page_names_is_there(name: str) -> None:
    assert pkgutil.resolve_name(name) is not None


def test_the_api_page_names_all_that_is_public() -> None:
    page, listed = (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), referenced()
    missing = [name for name in attrreg.__all__ if not any(f"{each}.".startswith(f"attrreg.{name}.") for each in listed)]
    members = re.findall(r"^        - (\w+)$", page, flags=re.MULTILINE)
    assert not missing and set(attrreg.captum.__all__) <= {*members, "from_captum"}


def test_files_can_be_read_at_a_sitting() -> None:
    files = [file for folder in ("attrreg", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")]
    long = [str(file.relative_to(ROOT)) for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 350]
    assert len(files) > 100 and not long, f"above 350 lines: {long}"
