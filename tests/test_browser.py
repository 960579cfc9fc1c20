"""What a user sees: MLflow's comparison of a sweep, and the report, in a real browser."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.runs import ROOT, free_port, start

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARMS = ("none", "warmdown", "clip03")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder in which a sweep of three arms and two seeds has ended."""
    folder = tmp_path_factory.mktemp("swept")
    arguments = ["preset=smoke", "recipe.max_steps=60", "recipe.log_every=5", "seed=0,1"]
    arguments += [f"stability={','.join(ARMS)}", "study=seen", "n_jobs=2"]
    process = start("train", ["--multirun", *arguments], folder, MLFLOW_TRACKING_URI="")
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return folder


@pytest.fixture(scope="module")
def pages(swept):
    """The addresses that `python -m src.ui` prints, by name, with its server running."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    log = swept / "ui.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "src.ui", f"port={port}"],
            cwd=swept,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(240):
            time.sleep(0.5)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            except OSError:
                continue
        found = dict(re.findall(r"seen, ([\w ]+): (\S+)", log.read_text()))
        assert {"arms compared", "table of runs", "answer"} <= set(found), log.read_text()
        yield found
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def test_the_printed_address_opens_the_arms_unfolded_with_their_charts(pages, browser, swept):
    page = browser.new_page(viewport={"width": 1500, "height": 1100})
    page.goto(pages["arms compared"])
    page.locator(".scatterlayer .trace").first.wait_for(timeout=90_000)
    assert page.get_by_text("Arms compared").first.is_visible()
    page.screenshot(path=str(swept / "compare.png"))
    text = page.inner_text("body")
    assert all(f"Group: {arm}" in text for arm in ARMS)
    # Two seeds an arm, all in sight.
    assert page.get_by_role("link", name=re.compile("mlha.*seed-")).count() == 2 * len(ARMS)
    for metric in ("train/loss", "val/loss", "grad/norm"):
        assert page.get_by_text(metric, exact=True).first.is_visible(), metric
    page.close()


def test_the_table_of_runs_has_their_outcomes_as_columns(pages, browser, swept):
    page = browser.new_page(viewport={"width": 2400, "height": 1000})
    page.goto(pages["table of runs"])
    page.get_by_text("result/val_loss").first.wait_for(timeout=90_000)
    page.screenshot(path=str(swept / "table.png"))
    text = page.inner_text("body")
    for column in ("seed", "outcome", "result/nonfinite_steps", "result/seconds"):
        assert column in text, column
    assert "sweep" not in page.locator(".ag-center-cols-container").first.inner_text()
    page.close()


def test_the_run_of_the_sweep_tells_the_answer_and_links_to_the_report(pages, browser, swept):
    page = browser.new_page(viewport={"width": 1500, "height": 1100})
    page.goto(pages["answer"])
    page.get_by_text("Show more").click(timeout=90_000)
    page.screenshot(path=str(swept / "answer.png"))
    described = page.inner_text("body")
    assert "non-finite runs" in described and all(arm in described for arm in ARMS)
    link = page.get_by_role("link", name="report", exact=True).get_attribute("href")
    page.goto(f"{pages['answer'].partition('#')[0]}{link[link.index('#') :]}")
    page.frame_locator("iframe").get_by_text("How to reproduce it").first.wait_for(timeout=60_000)
    page.close()


def test_the_report_opens_without_an_error_and_asks_nobody_for_anything(swept, browser):
    report = swept / "runs" / "seen" / "report" / "report.html"
    page = browser.new_page(viewport={"width": 1280, "height": 2000})
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    assert errors == []
    assert asked == [report.as_uri()]
    # Vega has drawn every chart again.
    page.locator("figure.chart").last.locator(".vega-embed svg").wait_for()
    charts = page.locator("figure.chart").count()
    assert page.locator("figure.chart .vega-embed svg").count() == charts >= 4
    text = page.inner_text("body")
    assert all(arm in text for arm in ARMS)
    # Nothing wider than the window: no reader scrolls sideways.
    page.set_viewport_size({"width": 500, "height": 900})
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    page.screenshot(path=str(swept / "report.png"), full_page=True)
    page.close()


def points(page):
    """The runs of the first chart."""
    return page.locator("figure.chart").first.locator(".mark-symbol.role-mark path")


def test_a_point_tells_its_run_and_leads_to_it(swept, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto((swept / "runs" / "seen" / "report" / "report.html").as_uri())
    page.locator("figure.chart").last.locator(".vega-embed svg").wait_for()
    points(page).first.hover(force=True)
    hint = page.locator("#vg-tooltip-element")
    hint.wait_for()
    said = hint.inner_text()
    assert all(word in said for word in ("arm", "seed", "non-finite batches", "outcome", "run"))
    # A click on the legend picks an outcome: the others pale.
    page.locator("figure.chart").first.get_by_text("clean", exact=True).click(force=True)
    assert {point.get_attribute("opacity") for point in points(page).all()} <= {"1", "0.08"}
    with page.expect_navigation():
        points(page).first.click(force=True)
    assert Path(unquote(urlparse(page.url).path)).parent.parent == swept / "runs" / "seen"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("scripts", [True, False])
def test_the_report_is_whole_in_light_and_dark_and_without_scripts(scheme, scripts, swept, browser):
    context = browser.new_context(color_scheme=scheme, java_script_enabled=scripts)
    page = context.new_page()
    page.goto((swept / "runs" / "seen" / "report" / "report.html").as_uri())
    page.wait_for_load_state("networkidle")
    assert page.locator("figure.chart svg").count() == page.locator("figure.chart").count() >= 4
    page.screenshot(path=str(swept / f"report-{scheme}-{scripts}.png"), full_page=True)
    if scripts:
        drawn = page.evaluate("getComputedStyle(document.querySelector('figure text')).fill")
        assert drawn == ("rgb(95, 99, 104)" if scheme == "light" else "rgb(164, 169, 176)")
    context.close()


def test_on_a_phone_nothing_is_out_of_sight_and_a_tap_tells_about_a_point(swept, browser):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    )
    page = context.new_page()
    report = (swept / "runs" / "seen" / "report" / "report.html").as_uri()
    page.goto(report)
    page.locator("figure.chart").last.locator(".vega-embed svg").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=str(swept / "phone.png"), full_page=True)
    # Every value of the first table, and every chart, within the width.
    for place in ("table.cards >> nth=0 >> td:not(.empty)", "figure.chart svg.marks"):
        for found in page.locator(place).all():
            box = found.bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 391, place
    points(page).first.tap(force=True)
    page.locator("#vg-tooltip-element").wait_for()
    assert page.url == report
    context.close()
