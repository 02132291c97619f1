"""The report opened from the disk in Chromium: read, searched, sorted, followed and printed, by pointer and by keys."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusion_compile.explain._show.html import write_diff_html, write_html
from tests.explain import report_data
from tests.explain.browser.chromium import Chromium, Page, find_chromium

NODES = "[data-table=nodes]"
LOAD_LIMIT = 3000.0  # ms, from the first byte to the load event, for 20,000 nodes


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    path = find_chromium()
    if path is None:
        said = "No Chromium was found; on Debian: apt-get install chromium."
        if os.environ.get("FUSION_COMPILE_REQUIRE_BROWSER"):
            pytest.fail(said)
        pytest.skip(said)
    with Chromium(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    step, larger = report_data.training_step(), report_data.training_step(3)
    larger["findings"] = larger["findings"][1:]
    write_html(step, folder / "step.html")
    write_html(report_data.sampler(), folder / "sampler.html")
    write_html(report_data.large(), folder / "large.html")
    write_diff_html(step, larger, folder / "diff.html")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def page(browser: Chromium, reports: dict[str, Path]) -> Iterator[Page]:
    """The step's report; afterwards nothing may have been said on the console, nor asked of anybody."""
    page = browser.page(1280, 900)
    page.open(reports["step"])
    yield page
    assert page.errors() == []
    assert set(page.requests()) == {reports["step"].as_uri()}
    page.close()


def shown(page: Page, column: int, table: str = NODES) -> list[str]:
    """The texts of a column's rows that lie in view, from the top."""
    return list(
        page.evaluate(
            f"""(() => {{
                const view = document.querySelector("{table} .view"), head = view.querySelector(".names").offsetHeight;
                const box = view.getBoundingClientRect();
                return [...view.querySelectorAll(".row")]
                    .map(row => [row.getBoundingClientRect().top, row.children[{column}].innerText.trim()])
                    .filter(([top]) => top >= box.top + head - 2 && top < box.bottom - 20)
                    .sort((a, b) => a[0] - b[0]).map(row => row[1]);
            }})()"""
        )
    )


def paper_of(image: Image.Image) -> int:
    """The brightness that most of a picture has, 0..255."""
    values = image.histogram()
    return max(range(256), key=values.__getitem__)


def ink(image: Image.Image) -> float:
    """The part of a picture that stands out from its paper."""
    paper = paper_of(image)
    return sum(n for value, n in enumerate(image.histogram()) if abs(value - paper) > 90) / (image.width * image.height)


def focus(page: Page) -> str:
    return str(page.evaluate("document.activeElement.className || document.activeElement.tagName"))


def test_a_finding_leads_to_its_node_and_back(page: Page) -> None:
    page.click("#finding-1 a[href^='#node-']")
    assert page.text(f"{NODES} .row[aria-selected=true]").split()[1:3] == ["✕", "loss"]
    detail = page.text(f"{NODES} .detail")
    assert "/home/ada/dit/train.py:31" in detail and "f32[]" in detail and "blocks" not in detail.split("inputs")[0]
    page.click(f"{NODES} .detail a[href='#finding-1']")
    assert page.evaluate("document.activeElement.id") == "finding-1"
    text = page.text("#finding-1")
    assert ".item() waits until the GPU has computed the loss" in text
    assert "Return the loss as a tensor" in text


def test_findings_are_filtered_by_kind_and_severity(page: Page) -> None:
    visible = "[...document.querySelectorAll('.finding')].filter(each => each.offsetHeight).map(each => each.id)"
    page.click(".chip[data-severity=warning]")
    assert page.evaluate(visible) == ["finding-0", "finding-3"]
    page.click(".chip[data-of-kind=python_scalar]")
    assert page.evaluate(visible) == ["finding-0"]
    assert page.text("#findings-shown") == "1 of 6 shown"
    page.click(".chip[data-severity=warning]")
    page.click(".chip[data-of-kind=python_scalar]")
    assert len(page.evaluate(visible)) == 6
    page.click(".verdict a[data-kind=host_sync]")
    assert page.evaluate(visible) == ["finding-1"]
    page.evaluate("location.hash = '#finding-3'")  # a link to what the filter hides shows it
    page.settle()
    assert page.evaluate("document.activeElement.id") == "finding-3"


def test_nodes_are_searched_filtered_and_sorted(page: Page) -> None:
    page.click(f"{NODES} input[type=search]")
    page.type("mlp.fc1 BACKWARD")
    assert page.text(f"{NODES} output") == "4 of 52 rows"
    assert shown(page, 1) == ["fc1_1_grad_input", "fc1_1_grad_weight", "fc1_0_grad_input", "fc1_0_grad_weight"]
    page.press("Escape")
    assert page.text(f"{NODES} output") == "52 rows"
    page.evaluate(
        f"""(() => {{ const it = document.querySelector("{NODES} select"); it.value = "optimizer";
        it.dispatchEvent(new Event("change")); }})()"""
    )
    assert page.text(f"{NODES} output") == "10 of 52 rows"
    page.click("#summary .expensive a")
    assert "model.py:91" in page.evaluate(f"document.querySelector('{NODES} input').value")
    assert set(shown(page, 3)) == {"model.py:91"}  # what the region's filter hid is shown again
    page.evaluate("location.hash = '#node-0-2'")
    page.settle()
    assert page.text(f"{NODES} output") == "52 rows"

    times = [node["microseconds"] for node in report_data.training_step()["graphs"][0]["nodes"]]
    head = f"{NODES} .names > :nth-child(6)"
    page.click(f"{head} button")
    assert page.evaluate(f"document.querySelector('{head}').getAttribute('aria-sort')") == "descending"
    assert shown(page, 0)[0] == str(times.index(max(times)))
    page.click(f"{head} button")
    assert shown(page, 0)[0] == str(times.index(min(times)))
    page.click(f"{head} button")
    assert shown(page, 0)[:3] == ["0", "1", "2"]


def test_no_row_has_it(page: Page) -> None:
    page.press("/")
    page.type("nothing-is-called-this")
    assert page.text(f"{NODES} .none") == "No row has all of this."
    assert shown(page, 1) == []


def test_all_of_it_by_keyboard(page: Page) -> None:
    page.press("Tab")
    assert focus(page) == "skip"
    page.press("Enter", "Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    page.press("/")
    assert page.evaluate(f"document.activeElement.matches('{NODES} input')")
    page.type("optimizer")
    page.press("ArrowDown")
    assert focus(page) == "view"
    chosen = f"{NODES} .row[aria-selected=true]"
    assert page.text(chosen).split()[1] == "update_qkv_0"
    page.press("ArrowDown", "ArrowDown", "ArrowUp")
    assert page.text(chosen).split()[1] == "update_scores_0"
    assert page.evaluate("document.activeElement.getAttribute('aria-activedescendant')") == page.evaluate(
        f"document.querySelector('{chosen}').id"
    )
    page.press("End")
    assert page.text(chosen).split()[0] == "51"
    page.press("Home", "Enter")
    assert focus(page) == "detail"
    page.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "copy"
    page.press("Escape")
    assert focus(page) == "view"
    page.press("/", "Escape")
    assert page.text(f"{NODES} output") == "52 rows"


def test_everything_that_can_be_pressed_can_be_reached_and_has_a_name(page: Page) -> None:
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, a, select, input, summary, [tabindex]")]
        .filter(it => !(it.getAttribute("aria-label") || it.textContent.trim())).map(it => it.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("[...document.querySelectorAll('[tabindex]')].every(it => it.tabIndex <= 0)")
    outlined: list[Any] = []
    for _ in range(14):
        page.press("Tab")
        outlined.append(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
    assert set(outlined) == {"solid"}


def test_a_source_line_is_copied(page: Page) -> None:
    page.evaluate("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    page.click("#finding-0 .copy")
    assert page.evaluate("window.copied") == "/home/ada/dit/train.py:12"
    assert page.text("#finding-0 .copy") == "copied"
    page.click(f"{NODES} .row")
    page.evaluate(f"document.querySelector('{NODES} .view').focus()")
    page.press("c")
    assert page.evaluate("window.copied") == "/home/ada/dit/train.py:20"


def test_a_pass_is_shown_before_and_after(page: Page) -> None:
    page.click("[data-pass='1'] > summary")
    sides = "[...document.querySelectorAll('[data-pass=\"1\"] .side.{}')].map(side => side.innerText.trim())"
    removed, added = page.evaluate(sides.format("removed")), page.evaluate(sides.format("added"))
    assert removed and len(removed) == len(added)
    assert "aten.add.Tensor" in removed[0] and "aten.add_.Tensor" in added[0]
    assert page.evaluate("document.querySelector('[data-pass=\"1\"] .added mark').textContent") == "_"
    assert "equal lines" in page.text("[data-pass='1'] .comparison")
    page.click("[data-pass='0'] > summary")
    assert len(page.evaluate(sides.format("removed").replace('"1"', '"0"'))) == 3


def test_a_kernel_leads_to_its_nodes_and_shows_its_code(page: Page) -> None:
    page.click("[data-table=kernels] .row:nth-child(2)")
    assert "def triton_per_fused_norm(" in page.text("[data-table=kernels] .detail pre")
    page.click("[data-table=kernels] .detail a[href^='#node-']")
    assert page.text(f"{NODES} .row[aria-selected=true]").split()[1] == "norm"


def test_the_memory_curve_answers_the_keys_and_the_pointer(page: Page) -> None:
    drawing = "[data-memory] .drawing.wide"
    page.evaluate(f"document.querySelector('{drawing}').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert "at node 2, qkv" in page.text("[data-memory] .readout")
    assert page.evaluate(f"document.querySelector('{drawing}').getAttribute('aria-valuenow')") == "2"
    page.press("Enter")
    assert page.text(f"{NODES} .row[aria-selected=true]").split()[1] == "qkv"
    page.click(drawing)
    middle = int(page.text(f"{NODES} .row[aria-selected=true]").split()[0])
    assert 20 <= middle <= 30  # of 52 nodes


def test_light_dark_and_the_system(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.colours("dark")
    dark = page.evaluate(paper)
    page.colours("light")
    light = page.evaluate(paper)
    assert dark != light
    page.click("#theme")
    page.click("#theme")
    assert page.text("#theme span") == "dark" and page.evaluate(paper) == dark
    page.reload()
    assert page.evaluate(paper) == dark  # the choice was kept
    page.click("#theme")
    assert page.text("#theme span") == "system" and page.evaluate(paper) == light


def test_the_text_can_be_read_in_both_themes(page: Page) -> None:
    """WCAG's contrast of 4.5 for each colour of text, on the page and on what is raised from it."""
    ratio = """(name, paper) => {
        const probe = document.body.appendChild(document.createElement("i"));
        const light = variable => {
            probe.style.color = `var(--${variable})`;
            const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
                .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const [a, b] = [light(name), light(paper)];
        probe.remove();
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    for scheme in ("light", "dark"):
        page.colours(scheme)
        for name in ("ink", "muted", "accent", "bad", "warn", "good"):
            for paper in ("paper", "raised"):
                assert page.evaluate(f"({ratio})('{name}', '{paper}')") >= 4.5, (scheme, name, paper)


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [
        ("step", 1280, "light"),
        ("step", 1280, "dark"),
        ("step", 480, "light"),
        ("step", 480, "dark"),
        ("sampler", 1280, "light"),
        ("sampler", 480, "dark"),
        ("diff", 1280, "dark"),
        ("diff", 480, "light"),
    ],
)
def test_the_picture_is_not_blank_and_fits(
    name: str, width: int, scheme: str, browser: Chromium, reports: dict[str, Path]
) -> None:
    page = browser.page(width, 900)
    page.colours(scheme)
    page.open(reports[name])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    image = Image.open(BytesIO(page.screenshot(whole=True))).convert("L")
    assert image.width == width and image.height > 1500
    shares = [ink(image.crop((0, top, width, top + 400))) for top in range(0, image.height - 400, 400)]
    assert min(shares) > 5e-4, shares  # a line of text and more in each 400 pixels
    assert max(shares) < 0.3, shares
    assert (paper_of(image) > 200) == (scheme == "light")
    plots = "[...document.querySelectorAll('.drawing, .diagram')].filter(it => it.getClientRects().length)"
    assert page.evaluate(f"{plots}.every(it => it.getBoundingClientRect().height > 100)")
    assert page.errors() == []
    assert page.requests() == [reports[name].as_uri()]
    page.close()


def test_20000_nodes_load_search_and_scroll_quickly(browser: Chromium, reports: dict[str, Path]) -> None:
    page = browser.page(1280, 900)
    loads = []
    for _ in range(3):
        page.open(reports["large"])
        loads.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(loads) < LOAD_LIMIT, loads
    assert page.evaluate("document.querySelectorAll('.row').length") < 300  # the rows in view, of 20,000
    page.press("/")
    page.type("mlp.fc1 backward")
    assert page.text(f"{NODES} output") == "1,600 of 20,000 rows"
    page.press("Escape", "ArrowDown", "End")
    assert page.text(f"{NODES} .row[aria-selected=true]").split()[0] == "19999"
    assert shown(page, 0)[-1] == "19999"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(f"document.querySelectorAll('{NODES} .row').length") == 150
    assert "The first 150 of 20,000 rows, the largest time first." in page.text(f"{NODES} .rows")
    largest = max(node["microseconds"] for node in report_data.large()["graphs"][0]["nodes"])
    assert page.text(f"{NODES} .row .bars") == f"{largest:.1f} µs"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown(page, 0)[0] == "0"
    page.click("#finding-150 a[href^='#node-']")
    assert "finding" in page.text(f"{NODES} .detail")
    assert page.errors() == []
    page.close()


def test_on_paper_everything_is_open_and_no_control_is_left(page: Page) -> None:
    assert page.pdf().startswith(b"%PDF-")
    folded = "[...document.querySelectorAll('details')].filter(it => !it.open).length"
    before = page.evaluate(folded)
    page.send("Emulation.setEmulatedMedia", media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(folded) == 0
    seen = "[...document.querySelectorAll({})].filter(it => it.getClientRects().length).length"
    assert page.evaluate(seen.format(json.dumps("button:not(.names button), input, select, nav, .copy, .skip"))) == 0
    assert page.evaluate(seen.format(json.dumps(f"{NODES} .row"))) == 52  # all rows of the table, not those in view
    assert "%add = aten.add.Tensor" in page.text("[data-pass='1'] .comparison")
    page.send("Emulation.setEmulatedMedia", media="")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(folded) == before


def test_a_script_or_a_picture_that_got_into_the_page_would_do_nothing(
    browser: Chromium, reports: dict[str, Path]
) -> None:
    page = browser.page(1280, 900)
    page.open(reports["step"])
    page.evaluate(
        """(() => {
            const script = document.createElement("script"), picture = new Image();
            script.textContent = "window.ran = true";
            document.body.append(script, picture);
            document.body.insertAdjacentHTML("beforeend", "<i onclick='window.ran = true' id=planted>x</i>");
            document.getElementById("planted").click();
            picture.src = "http://localhost:9/x.png";
        })()"""
    )
    page.settle()
    assert page.evaluate("window.ran") is None
    assert len(page.errors()) >= 3  # the browser says of each that the page's policy forbids it
    page.close()


def test_two_reports_compared(browser: Chromium, reports: dict[str, Path]) -> None:
    page = browser.page(1280, 900)
    page.open(reports["diff"])
    assert page.text(".verdict").startswith("0 new findings; 1 gone, 5 in both.")
    assert "python_scalar" in page.text("#findings")
    assert "52 →" in page.text("#regions .total") and "77" in page.text("#regions .total")
    page.press("/")
    page.type("gelu")
    assert page.text("[data-table=changed] output") == "2 of 25 rows"
    assert page.errors() == []
    page.close()
