"""The page in a real browser: it asks for nothing, shows what is so, and runs nothing of others."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, DRIVER, Browser, started
from factories import CURVE, make_device, make_measurement, make_profile, make_workload

from autochunk.report.comparison import comparison
from autochunk.report.curve import curve_record
from autochunk.report.overview import report_record
from autochunk.report.page import best_first, report_html
from autochunk.report.sources import Source
from autochunk.store.profile import Profile

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its chromedriver"
)
DEVICE = make_device()
SHAPES = ("t=64,k=8", "t=1024,h=8,k=64", "t=128,k=8,causal=yes")
HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=document.title='run'>"


def page_of(
    profiles: tuple[Profile, ...],
    then: tuple[Profile, ...] = (),
    misses: dict[Any, int] | None = None,
    note: str = "",
) -> str:
    source = Source("a place", "store", profiles, {DEVICE.key: misses} if misses else {}, note)
    record = report_record([source], DEVICE)
    changes = comparison(then, profiles) if then else None
    compared = {"against": "before", "limit": 0.05, "counts": {"slower": 1}} if then else {}
    return report_html({**record, "changes": changes, **compared})


def curves() -> tuple[Profile, ...]:
    """Three workloads, whose choices are 2, 4 and 8 times as fast as dense attention."""
    fast = (0.5, 0.125, 0.25)
    return tuple(
        make_profile(
            make_workload(shape),
            measurements=(*CURVE[:2], make_measurement("xla", 16.0, one, 40.0)),
        )
        for shape, one in zip(SHAPES, fast, strict=True)
    )


# --- The text -------------------------------------------------------------------------------------


def test_all_parts_are_there() -> None:
    """Devices, workloads, plans and why they were not chosen, versions, misses, what changed."""
    oom = make_measurement("xla_rows", 2.0, status="oom", detail="killed at 3 GB")
    now = make_profile(measurements=(*CURVE[:3], oom), complete=False)
    text = page_of((now,), then=(now,), misses={make_workload("t=9,k=9"): 3}, note="from the lab")
    for words in (DEVICE.key, "xla, 16 MB", "killed at 3 GB", "jaxlib 0.12.0", "Unfinished"):
        assert words in text
    for words in ("autochunk tune --shape b=1,t=9", "What changed", "from the lab", "2.00x"):
        assert words in text


def test_ids_are_of_one_element_each() -> None:
    """Many figures in one page; what one refers to is its own."""
    text = usual_page()
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)


def test_figures_are_named_for_those_who_do_not_see_them() -> None:
    """Each has a role and a label that says what it shows."""
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', usual_page())
    assert len(labels) == 3
    assert "3 plans" in labels[0]
    assert "Chosen is xla, 16 MB" in labels[0]
    assert "2.00x as fast as dense" in labels[0]


def test_plans_stand_best_first() -> None:
    """The choice, then by time, and last what has none."""
    oom = make_measurement("xla_rows", 2.0, status="oom")
    slow = make_measurement("xla", 1.0, 0.7, 500.0)
    curve = curve_record(make_profile(measurements=(oom, slow, *CURVE)))
    assert [curve["plans"][place]["plan"] for place in best_first(curve)] == [
        "xla, 16 MB",
        "xla, 1 MB",
        "xla_rows, 4 MB",
        "xla, do not chunk",
        "dense",
        "xla_rows, 2 MB",
    ]


def test_a_page_is_small_and_the_same_each_time() -> None:
    """No library travels in it; equal profiles give equal bytes, but for the time."""
    first, second = (re.sub(r"Made \S+", "", page_of(curves())) for _ in range(2))
    assert first == second
    assert len(first) < 150_000


def test_a_page_of_nothing_says_what_to_do() -> None:
    """An empty store is no error."""
    assert "<code>autochunk tune</code> makes some" in page_of(())


@pytest.mark.parametrize("measurements", [(make_measurement(status="oom"),), ()], ids=len)
def test_a_workload_without_times(measurements: Any) -> None:
    """It has no figure, and says so."""
    assert "No plan could be timed" in page_of((make_profile(measurements=measurements),))


def test_a_page_of_many_draws_what_was_measured_last() -> None:
    """On all devices together; tables have the others, too, and words say what to do."""
    profiles = [
        make_profile(
            make_workload(shape), make_device(kind=kind), created=f"202{year}-01-02T03:04:05Z"
        )
        for year, (kind, shape) in enumerate(itertools.product(("one/1", "two/2"), SHAPES))
    ]
    source = Source("a place", "store", tuple(profiles), {}, "")
    record = {**report_record([source], DEVICE), "changes": None}
    page = report_html(record, figures=2)
    drawn = re.findall(r'<svg id="|id="(w\d-\d)-slider"', page)
    assert [name for name in drawn if name] == ["w1-1", "w1-2"]
    assert page.count("Not drawn: ") == 4
    assert page.count('<table class="sortable plans">') == 6
    assert "--figures" in page
    assert "--figures" not in report_html(record, figures=6)


# --- In a browser ---------------------------------------------------------------------------------


@functools.cache
def usual_page() -> str:
    return page_of(curves(), then=curves())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as one:
        yield one


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Browser]:
    """A page of three workloads; afterwards no error may be in the console, and no request out."""
    file = tmp_path / "report.html"
    file.write_text(usual_page())
    browser.look()
    browser.errors(), browser.requests()
    browser.open(file)
    yield browser
    assert browser.errors() == []
    assert [url for url in browser.requests() if url != file.as_uri()] == []


def _text(browser: Browser, selector: str) -> Any:
    return browser.run("return document.querySelector(arguments[0]).textContent", selector)


@needs_browser
def test_the_slider_moves_the_choice(opened: Browser) -> None:
    """By the keyboard: at the left end nothing fits, at the right end there is no budget."""
    opened.run("document.querySelector('details').open = true")
    opened.run("document.querySelector('#w0-0-slider').focus()")
    said, rings = [], []
    for key in ("Home", "End"):
        opened.press(key)
        said.append(_text(opened, ".budget output"))
        rings.append(opened.run("return document.querySelectorAll('#w0-0 .picked').length"))
    assert "nothing that was measured fits" in said[0]
    assert "no budget → xla, 16 MB" in said[1]
    assert rings == [1, 1]  # the line of the budget, then the ring of the choice
    shown = "return document.querySelector('#w0-0-slider').getAttribute('aria-valuetext')"
    assert opened.run(shown) == "no budget: xla, 16 MB: 50 ms, 40 MB"


@needs_browser
def test_the_slider_picks_what_auto_does(opened: Browser) -> None:
    """The page's own script, for many budgets."""
    script = (
        "const moves = JSON.parse(document.querySelector('.budget script').textContent);"
        "return arguments[0].map((budget) => pickWithin(moves, budget))"
    )
    budgets = [1.0, 39.999999, 40.0, 40.000001, 299.0, 300.0, 1e5, None]
    profile = curves()[0]
    choices = [profile.choose(memory_budget_mb=budget) for budget in budgets]
    places = [one and profile.measurements.index(one.measurement) for one in choices]
    assert opened.run(script, budgets) == places


@needs_browser
def test_tables_sort(opened: Browser) -> None:
    """Numbers by value, up and down, and said so to those who do not see the arrow."""
    script = (
        "const head = document.querySelector('#t0 thead').rows[0].cells[4];"
        "head.querySelector('button').click();"
        "return [head.ariaSort, ...[...document.querySelector('#t0').tBodies[0].rows]"
        ".map((row) => row.cells[4].textContent)]"
    )
    assert opened.run(script) == ["ascending", "2.00x", "4.00x", "8.00x"]
    assert opened.run(script) == ["descending", "8.00x", "4.00x", "2.00x"]


@needs_browser
def test_workloads_are_found(opened: Browser) -> None:
    """By all words; what is left out of the table is left out below it, too."""
    script = (
        "const input = document.querySelector('.find'); input.value = arguments[0];"
        "input.dispatchEvent(new Event('input'));"
        "return [...document.querySelectorAll('details:not([hidden]) summary h3')]"
        ".map((one) => one.textContent)"
    )
    (found,) = opened.run(script, "causal forward")
    assert "causal=yes" in found
    assert _text(opened, "[role=status]") == "1 of 3 shown"
    assert len(opened.run(script, "")) == 3


@needs_browser
def test_a_link_opens_its_workload(opened: Browser) -> None:
    """From the table to the curve."""
    opened.run("document.querySelectorAll('#t0 a')[1].click()")
    assert opened.run(
        "return new Promise((done) => setTimeout(() => done(w()), 50));"
        "function w() { return document.getElementById('w0-1').open }"
    )


@needs_browser
@pytest.mark.parametrize("width", [390, 768, 1200])
def test_the_page_is_no_wider_than_the_window(opened: Browser, width: int) -> None:
    """What is wider scrolls in its own box, on a phone as on a desk."""
    opened.look(width=width)
    opened.run("for (const one of document.querySelectorAll('details')) one.open = true")
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert opened.run(wide) == 0


@needs_browser
def test_a_phone_shows_all_of_a_plan(opened: Browser) -> None:
    """Why it was not chosen stands below it, not beyond the edge."""
    opened.look(width=390)
    opened.run("document.querySelector('details').open = true")
    script = (
        "const box = document.querySelector('details .plans').parentElement;"
        "const why = [...box.querySelectorAll('td.why')].filter((one) => one.textContent);"
        "return [box.scrollWidth - box.clientWidth, why.length,"
        " why.every((one) => one.getBoundingClientRect().width > 200)]"
    )
    wider, reasons, shown = opened.run(script)
    assert wider == 0
    assert reasons > 0
    assert shown


@needs_browser
def test_light_and_dark(opened: Browser) -> None:
    """As the reader's system is, figures too; text is readable on both (contrast of 4.5 to 1)."""
    colors = (
        "const of = (name) => getComputedStyle(document.querySelector(name));"
        "return [of('body').backgroundColor, of('body').color, of('.soft').color,"
        "of('figure svg text').fill, of('a').color, of('.tag.pick').color]"
    )
    for scheme in ("light", "dark"):
        opened.look(scheme=scheme)
        paper, *inks = map(_luminance, opened.run(colors))
        assert (paper > 0.5) == (scheme == "light")
        for ink in inks:
            assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) >= 4.5


def _luminance(color: str) -> float:
    """Of "rgb(r, g, b)", by WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(share * one for share, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@needs_browser
def test_printing_opens_every_workload(opened: Browser) -> None:
    """Paper cannot be clicked; afterwards the page is as it was."""
    opened.run(
        "addEventListener('beforeprint', () =>"
        " window.wasOpen = document.querySelectorAll('details[open]').length)"
    )
    assert opened.pdf().startswith(b"%PDF")
    assert opened.run("return window.wasOpen") == 3
    assert opened.run("return document.querySelectorAll('details[open]').length") == 0


@needs_browser
def test_every_control_is_reached_by_the_keyboard(opened: Browser) -> None:
    """Tab goes from the first link to a head of a table, and Enter sorts by it."""
    for _ in range(60):
        opened.press("Tab")
        if opened.run("return document.activeElement.closest('#t0 thead') !== null"):
            break
    opened.press("Enter")
    assert opened.run("return document.activeElement.closest('th').ariaSort") == "ascending"


@needs_browser
def test_what_bundles_say_is_text(browser: Browser, tmp_path: Path) -> None:
    """A device's name, a failure's detail and a note run nothing, wherever they stand."""
    hostile = make_device(kind=HOSTILE, jaxlib=HOSTILE, driver=HOSTILE)
    oom = make_measurement("xla_rows", 2.0, status="oom", detail=HOSTILE)
    profile = make_profile(device=hostile, measurements=(*CURVE[:3], oom))
    file = tmp_path / "hostile.html"
    file.write_text(page_of((profile,), then=(profile,), note=HOSTILE))
    browser.errors(), browser.requests()
    browser.open(file)
    assert browser.run("return document.title").startswith("autochunk report")
    assert HOSTILE in _text(browser, "h2#d0-title")
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.querySelectorAll('script:not([type])').length") == 1
    assert browser.errors() == []
    assert browser.requests() == [file.as_uri()]


@needs_browser
def test_the_policy_stops_what_is_not_ours(browser: Browser, tmp_path: Path) -> None:
    """Were a text not escaped, it would still not run, nor be asked for."""
    file = tmp_path / "edited.html"
    file.write_text(usual_page().replace("<main", f"{HOSTILE}<main", 1))
    browser.open(file)
    assert browser.run("return document.title").startswith("autochunk report")
    assert any("Content Security Policy" in error for error in browser.errors())
