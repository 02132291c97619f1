"""The documentation site: it builds without a warning, its reference has every public name, and it works in a browser.

The site is served from this machine, and nothing that a page loads may come from another.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from tests.explain.browser.chromium import Chromium, Page, find_chromium
from tests.test_house import PUBLIC_PACKAGES, public_names

ROOT = Path(__file__).parents[1]
REFERENCE = {package: ROOT / "docs/reference" / f"{package.rpartition('.')[2]}.md" for package in PUBLIC_PACKAGES}
CHROMIUM = find_chromium()
PATIENCE = 20.0  # seconds until a page's scripts have done what was asked for; a busy machine takes some
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("FUSION_COMPILE_REQUIRE_BROWSER"),
    reason="no Chromium; FUSION_COMPILE_REQUIRE_BROWSER=1 makes this a failure",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: strictly, so that a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    assert CHROMIUM is not None, "FUSION_COMPILE_REQUIRE_BROWSER is set, and no chromium is on the PATH: install it."
    with Chromium(CHROMIUM) as running:
        yield running


def wait_until(page: Page, condition: str) -> None:
    """Until a JavaScript expression is true; a failure names it. While the page leaves for another, nothing is."""
    deadline = time.monotonic() + PATIENCE
    while not _is_true(page, condition):
        assert time.monotonic() < deadline, f"after {PATIENCE:.0f} s this is still not true: {condition}"
        time.sleep(0.05)


def _is_true(page: Page, condition: str) -> bool:
    try:
        return bool(page.evaluate(f"Boolean({condition})"))
    except RuntimeError as error:
        _raise_unless_left(error)
        return False


def _raise_unless_left(error: RuntimeError) -> None:
    """A page that is left for another answers no question any more; every other refusal of the browser is raised."""
    if "navigated" not in str(error) and "context was destroyed" not in str(error):
        raise error


def follow(page: Page, selector: str) -> None:
    """Press a link, until the page that it leads to is there."""
    before = page.evaluate("location.href")
    try:
        page.click(selector)
    except RuntimeError as error:
        _raise_unless_left(error)
    wait_until(page, f"location.href !== {before!r} && document.readyState === 'complete'")


def visit(page: Page, address: str) -> None:
    page.send("Page.navigate", url=address)
    wait_until(page, f"location.href === {address!r} && document.readyState === 'complete'")
    wait_until(page, "document.documentElement.classList.contains('js')")  # the theme's script has run


def resolved(path: str) -> Any:
    """The object that ``fusion_compile.optim.lion.scale_by_lion`` is, looked for in its longest module."""
    module, names = path, list[str]()
    while not _is_module(module):
        module, _, name = module.rpartition(".")
        names.insert(0, name)
    found: Any = importlib.import_module(module)
    for name in names:
        found = getattr(found, name)
    return found


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def documented() -> dict[str, Any]:
    """What the reference generates pages from: path -> object."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.values())
    return {path: resolved(path) for path in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_the_reference_has_every_public_name(package: str) -> None:
    module = importlib.import_module(package)
    paths = documented()
    public = {name: getattr(module, name) for name in public_names(package)}
    missing = [
        name
        for name, value in public.items()
        if not isinstance(value, ModuleType)
        and not any(path.rpartition(".")[2] == name and value is found for path, found in paths.items())
    ]
    assert not missing, f"{REFERENCE[package].relative_to(ROOT)} has no line '::: …' for {', '.join(missing)}."


def test_the_reference_documents_objects_and_not_modules() -> None:
    """``fusion_compile.optim.lion`` is a module and a function; the page would show the module."""
    assert [path for path, found in documented().items() if isinstance(found, ModuleType)] == []


def loaded_from_elsewhere(html_or_css: str) -> list[str]:
    """Addresses of other machines that a browser fetches by itself; a link that a reader may follow is none."""
    tags = r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\s\"'>]+)"
    rules = r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\s\"')]+)"
    return re.findall(tags, html_or_css) + re.findall(rules, html_or_css)


def test_nothing_that_a_page_loads_lies_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 30
    assert {file.name: found for file in files if (found := loaded_from_elsewhere(file.read_text("utf-8")))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<script async src="https://cdn.example/x.js">', 1),
        ("<link rel=stylesheet href=//fonts.example/css>", 1),
        ("@font-face { src: url('https://fonts.example/a.woff2') }", 1),
        ('<a href="https://arxiv.org/abs/2302.06675"><img src="assets/a.png">', 0),
    ],
)
def test_a_planted_load_from_elsewhere_is_found(text: str, found: int) -> None:
    assert len(loaded_from_elsewhere(text)) == found


def test_a_call_of_a_step_is_documented_and_private_names_are_not(site: Path) -> None:
    text = (site / "reference/fusion_compile.html").read_text("utf-8")
    assert 'id="fusion_compile.TrainingStep.__call__"' in text
    assert re.findall(r'id="(fusion_compile\.TrainingStep\._[a-z]\w*)"', text) == []


def test_hooks_and_raw_numbers_are_not_published(site: Path) -> None:
    assert [path for path in site.rglob("*") if path.suffix in {".py", ".pyc"}] == []
    assert not (site / "benchmarks").exists()


def test_a_link_into_the_repository_names_its_file(site: Path) -> None:
    home = (site / "index.html").read_text("utf-8")
    assert "<code>CONTRIBUTING.md</code>" in home and "../CONTRIBUTING.md" not in home


@pytest.fixture
def page(browser: Chromium, address: str) -> Iterator[Page]:
    """The home page in a window of a desktop. Afterwards: no console error, and no request to another machine."""
    page = browser.page(1280, 900)
    visit(page, f"{address}/index.html")
    yield page
    assert page.errors() == []
    away = [url for url in page.requests() if not url.startswith((address, "data:", "blob:"))]
    assert away == []
    page.close()


@needs_browser
def test_the_home_page_is_there(page: Page) -> None:
    assert page.text("h1").startswith("fusion_compile")
    assert "compile_training_step" in page.text("article table")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


@needs_browser
def test_the_navigation_leads_to_the_reference_of_a_function(page: Page) -> None:
    for words in ("Reference", "fusion_compile.optim"):
        page.evaluate(
            f"""[...document.querySelectorAll("nav a")].find(
            it => it.getClientRects().length && it.innerText.trim() === {words!r}).setAttribute("data-here", "")"""
        )
        follow(page, "nav a[data-here]")
    assert page.evaluate("location.pathname") == "/reference/optim.html"
    signature = page.evaluate("""document.getElementById("fusion_compile.optim.adamw").nextElementSibling.innerText""")
    assert "adamw(" in signature and "weight_decay" in signature


@needs_browser
def test_the_search_finds_a_public_name(page: Page) -> None:
    page.click(".md-search__input")
    page.type("optimize_sampler")
    wait_until(page, "document.querySelectorAll('.md-search-result__item').length > 2")
    links = page.evaluate("[...document.querySelectorAll('.md-search-result__link')].map(it => it.href)")
    assert any("/reference/fusion_compile.html" in link for link in links)


@needs_browser
def test_the_colours_follow_the_system_until_the_switch_is_used(page: Page) -> None:
    scheme = "document.body.getAttribute('data-md-color-scheme')"
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for system, name in (("dark", "slate"), ("light", "default")):
        page.colours(system)
        wait_until(page, f"{scheme} === {name!r}")
        seen[system] = page.evaluate(paper)
    assert seen["light"] != seen["dark"]
    page.click("label[title='Switch to light colours']")
    page.click("label[title='Switch to dark colours']")
    wait_until(page, f"{paper} === {seen['dark']!r}")
    page.click('label[title="Follow the system\'s colours"]')
    wait_until(page, f"{paper} === {seen['light']!r}")


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("path", ["index", "concepts/bank", "concepts/binding-time", "reference/optim", "optimizers"])
def test_a_page_fits_and_is_not_blank(path: str, width: int, page: Page, address: str) -> None:
    page.resize(width, 900)
    visit(page, f"{address}/{path}.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    image = Image.open(BytesIO(page.screenshot())).convert("L")
    values = image.histogram()
    paper = max(range(256), key=values.__getitem__)
    ink = sum(n for value, n in enumerate(values) if abs(value - paper) > 60) / (image.width * image.height)
    assert 0.005 < ink < 0.5, ink  # a heading and some lines of text, and not a window of one colour
