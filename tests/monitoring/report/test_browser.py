"""The pages in a real browser: drawn without a complaint or a request, and doing what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_tracking.monitoring.report.run import run_report
from ray_tracking.monitoring.report.sweep import sweep_report
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import TrialRecord
from ray_tracking.storage import Storage
from tests.browser import EXECUTABLE, Page, browser
from tests.monitoring.sweep_builder import BEST, LOST, a_sweep

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="NO BROWSER: the reports were not looked at. Install one: apt-get install chromium"
)

EVIL = ["<script>window.hacked=1</script>", '"><img src=x onerror=window.hacked=1>', "</script><b>%{x}</b>"]
DRAWN = "document.documentElement.dataset.drawn"
FIRST_COLUMN = "[...document.querySelectorAll('table.sortable tbody tr')].map(row => Number(row.dataset.trial))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def store(folder: Path) -> RunStore:
    store = RunStore(Storage.open(folder / "runs"))
    sweep = a_sweep(store)
    for number, note in enumerate(EVIL, 1):
        (record,) = [trial for trial in sweep.load() if trial.number == number]
        sweep.save(TrialRecord(**{**_fields(record), "params": {**record.params, "note": note, EVIL[0]: number}}))
    (lost,) = [trial for trial in sweep.load() if trial.number == LOST]
    sweep.save(replace(lost, reason=f"ValueError: {EVIL[0]}"))
    return store


def _fields(record: TrialRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__}


@pytest.fixture(scope="module")
def page(store: RunStore, folder: Path) -> Iterator[Page]:
    path = folder / "sweep.html"
    path.write_text(sweep_report(store, "s"), encoding="utf-8")
    with browser(path) as page:
        page.wait(DRAWN)
        yield page
        assert page.complaints == []
        assert page.requests == []


def test_everything_is_drawn_in_silence(page: Page) -> None:
    drawn = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.chart')].map(chart =>"
        " [chart.dataset.chart, chart.querySelectorAll('.main-svg path').length]))"
    )
    assert set(drawn) == {"history", "importance", "parallel", "curves", "slices"}
    assert min(drawn.values()) > 5
    assert page.evaluate("document.querySelectorAll('section').length") == 9
    assert page.complaints == []
    assert page.requests == []


def test_what_users_wrote_is_shown_and_does_nothing(page: Page) -> None:
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.images.length") == 0
    cells = page.evaluate("[...document.querySelectorAll('td')].map(cell => cell.textContent)")
    assert set(EVIL) <= set(cells)
    titles = page.evaluate("[...document.querySelectorAll('#chart-slices text')].map(each => each.textContent)")
    assert EVIL[0] in titles
    assert page.evaluate("document.querySelector('#chart-slices text b')") is None


def test_a_heading_sorts_both_ways_and_what_is_missing_comes_last(page: Page) -> None:
    page.evaluate("document.querySelector('thead th:nth-child(1) button').click()")
    assert page.evaluate(FIRST_COLUMN) == list(range(1, 13))
    page.evaluate("document.querySelector('thead th:nth-child(2) button').click()")
    upward = page.evaluate(FIRST_COLUMN)
    page.evaluate("document.querySelector('thead th:nth-child(2) button').click()")
    downward = page.evaluate(FIRST_COLUMN)
    assert upward[0] == downward[-2] == BEST
    assert upward[-1] == downward[-1] == LOST
    assert page.evaluate("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "descending"


def test_a_row_marks_its_trial_in_the_charts(page: Page) -> None:
    page.evaluate("document.querySelector('tr[data-trial=\"3\"]').click()")
    marked = (
        "document.getElementById('chart-%s').data.filter(trace => trace.meta && trace.meta.overlay)"
        ".map(trace => trace.x.filter(x => x !== null))"
    )
    assert page.wait(f"{marked % 'history'}[0].length && {marked % 'history'}") == [[3]]
    assert page.evaluate(marked % "curves")[0] == [10, 20, 30, 40, 50, 60, 70, 80, 80]
    assert page.evaluate("document.getElementById('chart-curves').classList.contains('dim')")
    page.evaluate("document.querySelector('tr[data-trial=\"3\"]').click()")
    page.wait("!document.getElementById('chart-curves').classList.contains('dim')")


def test_the_curves_show_another_metric_over_another_axis(page: Page) -> None:
    page.evaluate(
        "for (const [what, value] of [['key', 'train/loss'], ['along', 'minutes']]) {"
        " const select = document.querySelector(`select[data-what=${what}]`);"
        " select.value = value; select.dispatchEvent(new Event('change')); }"
    )
    shown = page.wait(
        "(chart => chart.layout.yaxis.title.text === 'train/loss' && chart.layout.xaxis.title.text === 'minutes'"
        " && chart.data.flatMap(trace => trace.x))(document.getElementById('chart-curves'))"
    )
    assert max(x for x in shown if x is not None) == 7


def test_it_follows_the_theme_and_prints(page: Page) -> None:
    def colours() -> list[str]:
        found = page.evaluate(
            "[getComputedStyle(document.body).color, document.getElementById('chart-history').layout.font.color]"
        )
        return list(found)

    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    light = colours()
    page.call("Emulation.setEmulatedMedia", features=features)
    dark_ink = "getComputedStyle(document.body).color === 'rgb(232, 237, 245)'"
    page.wait(f"{dark_ink} && document.getElementById('chart-history').layout.font.color !== '{light[1]}'")
    assert page.call("Page.printToPDF", printBackground=False)["data"]
    page.call("Emulation.setEmulatedMedia", features=[])
    page.wait(f"document.getElementById('chart-history').layout.font.color === '{light[1]}'")


def test_a_run_has_a_page_too(store: RunStore, folder: Path) -> None:
    path = folder / "run.html"
    path.write_text(run_report(store, f"s.trial-{BEST:03d}"), encoding="utf-8")
    with browser(path) as page:
        page.wait(DRAWN)
        assert page.evaluate("document.querySelectorAll('.chart .main-svg .scatterlayer path').length") >= 2
        titles = json.dumps(page.evaluate("[...document.querySelectorAll('h2')].map(each => each.textContent)"))
        assert titles == json.dumps(["val/loss", "train/loss", "Attempts", "Checkpoints", "Configuration"])
        assert page.complaints == []
        assert page.requests == []
