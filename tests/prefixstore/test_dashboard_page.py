"""The dashboard's page in a real browser: what it loads and shows, also for hostile names."""

import re
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import uvicorn
from cached_models import BLOCK_SIZE, random_tokens, run, tiny_llama
from fastapi import FastAPI
from watched_engine import WatchedEngine, make_report

from prefixstore.cache import PrefixCache
from prefixstore.dashboard import dashboard_router
from prefixstore.planner.stats import ModeStats

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
HOSTILE = "<img src=x onerror=document.title='owned'>"
WIDE, NARROW = (1280, 900), (400, 800)


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip("needs Chromium: apt install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(1)
    model = tiny_llama()
    options = {"block_size": BLOCK_SIZE, "pool_tokens": 4096, "memory_bytes": 1 << 20}
    with PrefixCache.open(model, **options) as cache:
        yield WatchedEngine(model, cache)


@pytest.fixture(scope="module")
def busy_engine(engine):
    """An engine with prefixes of two namespaces, cold and warm requests, and hostile names."""
    shared = random_tokens(12 * BLOCK_SIZE, 1)
    for seed in range(6):
        tokens = torch.cat([shared, random_tokens(3 * BLOCK_SIZE, seed + 2)], 1)
        run(engine.cache, engine.model, tokens, num_new=1)
    with engine.cache.session(shared, salt=HOSTILE) as session, torch.no_grad():
        engine.model(shared, past_key_values=session)
    for i in range(30):
        engine.serve(make_report(i, {}, 7000, 5.0 + 0.1 * i, tenant=HOSTILE))
        engine.serve(make_report(i, {"device": 6400, "disk": 600}, 90, 0.1 + 0.01 * i, load_s=0.05))
    engine.given |= {"num_running": 3, "num_audits": 2, "audited_blocks": 40, "num_quarantined": 5}
    modes = {"load": ModeStats(9, 8, 0.9, 1.0, 3.0, 0.1, 0.08, 0.2)}
    engine.given["planner"] = replace(engine.planner.stats(), modes=modes)
    return engine


@pytest.fixture(scope="module")
def serve():
    """Serve a dashboard on a free port of this machine; yields its address."""
    servers = []

    def start(engine):
        app = FastAPI()
        app.include_router(dashboard_router(engine, show_text=True))
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        servers.append((server, thread, listener))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread, listener in servers:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        listener.close()


@pytest.fixture(scope="module")
def address(serve, busy_engine):
    return serve(busy_engine)


@pytest.fixture
def open_page(chromium):
    """Opens an address in its own browser; afterwards no error may have been reported."""
    contexts, problems = [], []

    def open_one(address, size=WIDE, scheme="light", **options):
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.problems = problems
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(address + "/")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []


def wait_filled(page):
    """Wait until every query was answered once, without eval, which the page's CSP forbids."""
    page.locator("#request-list .request").first.wait_for()
    page.locator("#tree-plot rect").first.wait_for()


def wait_state(page, state):
    page.locator(f"#state[data-state='{state}']").wait_for()


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fills_and_fits(open_page, address, scheme, size) -> None:
    page = open_page(address, size, scheme)
    wait_filled(page)
    assert page.inner_text("#state") == "live"
    assert page.inner_text("#tile-reused").strip("% \n").isdigit()
    assert "times sooner" in page.inner_text("#tile-warm-note")
    assert page.locator("#request-list .request").count() == 10
    assert page.locator("#tier-list .tier").count() == 2
    assert page.locator("#first-plot circle").count() == 60
    assert page.locator("#tree-plot rect.run").count() >= 8
    assert "never seen" in page.inner_text("#miss-list")
    assert "Predicted 113 ms, took 125 ms on average" in page.inner_text("#plan-list")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(part) for part in re.findall(r"\d+", background)[:3])
    assert (lightness > 600) == (scheme == "light")
    assert {url.split("/dashboard/")[0].rstrip("/") for url in page.asked} == {address}


# The lowest contrast of any text with its background, and that text (WCAG: 4.5 or more).
LEAST_CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => rgb.slice(0, 3).map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = numbers(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
  };
  let least = [99, ""];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(".run-label, noscript")) continue;  // labels of bars lie on the bars
    const style = getComputedStyle(element);
    const colour = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const both = [luminance(numbers(colour)), luminance(behind(element))];
    const [low, high] = both.sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < least[0]) least = [contrast, texts.currentNode.data];
  }
  return least;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(open_page, address, scheme) -> None:
    page = open_page(address, scheme=scheme)
    wait_filled(page)
    contrast, text = page.evaluate(LEAST_CONTRAST)
    assert contrast >= 4.5, text


def test_audits_stand_below_the_tiers(open_page, serve, engine) -> None:
    audited = WatchedEngine(engine.model, engine.cache)
    audited.serve(make_report())
    audited.given |= {"num_audits": 12, "audited_blocks": 340}
    page = open_page(serve(audited))
    note = page.locator("#tier-list .tier-note")
    note.wait_for()
    assert note.inner_text() == "12 prompts audited: 340 reused blocks computed again, none wrong"
    assert note.locator(".tier-troubles").count() == 0
    audited.given["num_quarantined"] = 1
    trouble = note.locator(".tier-troubles")
    trouble.wait_for()
    assert trouble.inner_text() == "1 block quarantined: look at the log"


def test_hostile_names_are_only_text(open_page, address) -> None:
    page = open_page(address)
    wait_filled(page)
    assert HOSTILE in page.inner_text("#request-list")
    assert page.locator("main img").count() == 0
    assert "owned" not in page.title()
    assert HOSTILE not in page.inner_text("#tree-detail")


def test_asks_one_question_a_second(open_page, address) -> None:
    page = open_page(address)
    wait_filled(page)
    page.wait_for_timeout(500)
    del page.asked[:]
    page.wait_for_timeout(4000)
    assert 2 <= len(page.asked) <= 5
    page.click("#pause")
    page.wait_for_timeout(1500)
    num_asked = len(page.asked)
    page.wait_for_timeout(2500)
    assert len(page.asked) == num_asked
    assert page.inner_text("#state") == "paused"


def test_keys_walk_the_tree(open_page, address) -> None:
    page = open_page(address)
    wait_filled(page)
    page.click("#pause")
    page.focus("#tree-plot")
    page.keyboard.press("ArrowRight")
    front = page.inner_text("#tree-detail")
    assert front.startswith("Tokens 0 to 192 (192) · depth 1")
    assert "begins “" in front
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#tree-detail")
    assert "Tokens 192 to" in first and "depth 2" in first
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#tree-detail") != first
    assert page.locator("#tree-plot .is-chosen").count() == 1
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#tree-detail") == front


def test_pointing_at_a_bar_describes_it(open_page, address) -> None:
    page = open_page(address)
    wait_filled(page)
    page.click("#pause")
    page.locator("#tree-plot rect.run").first.hover()
    assert page.inner_text("#tree-detail").startswith("Tokens 0 to")


def test_whole_answers_take_longer_than_first_tokens(open_page, address) -> None:
    page = open_page(address)
    wait_filled(page)
    page.click("#pause")
    assert page.locator(".lane .phase-decode").count() == 0
    page.get_by_label("whole answers").check()
    assert page.locator(".lane .phase-decode").count() == 10
    page.click("#request-more")
    assert page.locator("#request-list .request").count() == 40


def test_loading_and_computing_are_drawn_beside_each_other(open_page, address) -> None:
    page = open_page(address)
    wait_filled(page)
    row = page.locator("#request-list .request").first  # 0.05 s of 0.39 s beside computing
    load = row.locator(".phase-load").bounding_box()
    compute = row.locator(".phase-compute").bounding_box()
    assert load["y"] + load["height"] <= compute["y"]
    assert load["x"] < compute["x"] + compute["width"] and compute["x"] < load["x"] + load["width"]
    assert "fill-disk" in row.locator(".phase-load").get_attribute("class")


def test_nothing_jumps_once_it_is_filled(open_page, address, busy_engine) -> None:
    page = open_page(address)
    wait_filled(page)
    page.wait_for_timeout(1000)
    page.evaluate("""() => {
      window.shifts = 0;
      const add = (entry) => { window.shifts += entry.value; };
      new PerformanceObserver((list) => list.getEntries().forEach(add))
        .observe({ type: "layout-shift" });
    }""")
    for i in range(6):
        busy_engine.serve(make_report(100 + i, {"device": 6400}, 90, 0.2))
        page.wait_for_timeout(1100)
    assert "cmpl-000069" in page.inner_text("#request-list")
    assert page.evaluate("window.shifts") < 0.02


def test_says_when_the_server_does_not_answer_and_goes_on_after(open_page, address) -> None:
    page = open_page(address)
    wait_filled(page)
    page.context.set_offline(True)
    wait_state(page, "no answer")
    banner = page.locator("#banner")
    assert banner.is_visible() and "No answer from the server" in banner.inner_text()
    page.context.set_offline(False)
    wait_state(page, "live")
    assert not banner.is_visible()
    # Only the browser itself reports the failed request.
    assert all("ERR_INTERNET_DISCONNECTED" in problem for problem in page.problems)
    page.problems.clear()


def test_nothing_moves_for_those_who_want_no_motion(open_page, address) -> None:
    page = open_page(address, reduced_motion="reduce")
    wait_filled(page)
    assert page.evaluate("document.getAnimations().length") == 0


def test_empty_page_says_what_to_do(open_page, serve, engine) -> None:
    fresh = WatchedEngine(engine.model, engine.cache)
    address = serve(fresh)
    page = open_page(address)
    page.locator("#request-empty").wait_for()
    assert f"curl {address}/v1/completions" in page.inner_text("#request-empty")
    assert "No request has been answered yet" in page.inner_text("#first-empty")
    assert "Nothing was missed yet" in page.inner_text("#miss-empty")
    time.sleep(1)
    assert "NaN" not in page.inner_text("body") and "undefined" not in page.inner_text("body")
