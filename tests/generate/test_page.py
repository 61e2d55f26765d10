"""The page in a real browser: it writes, talks, stops, and shows whatever comes as text."""

import shutil
import threading
import time

import pytest
from tiny_server import CONFIG, serving, tiny_text

from olmo_jax.generate.driver import Driver
from olmo_jax.generate.engine import Engine
from olmo_jax.generate.server import Server
from olmo_jax.model.transformer import init

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None or shutil.which("chromedriver") is None,
        reason="needs Debian's chromium and chromium-driver",
    ),
]
# Nothing of the browser's own goes out to the network.
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--window-size=1000,760",
]
NASTY = "<img src=x onerror=document.title=1>"


class Gated(Engine):
    """An engine that the test can hold."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.open = threading.Event()
        self.open.set()

    def step(self):
        self.open.wait()
        return super().step()


@pytest.fixture(scope="module")
def engine():
    return Gated(init(CONFIG), slots=2)


@pytest.fixture(scope="module", params=["base", "chat"])
def server(request, engine, tmp_path_factory):
    text = tiny_text(tmp_path_factory.mktemp("text"), (), chat=request.param == "chat")
    server = Server("org/tiny <b>", Driver(engine, 8), text)
    with serving(server) as address:
        yield server, address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def page(server, browser):
    """The page, loaded; no script or style may have been refused at the end."""
    browser.get(server[1])
    until(lambda: find(browser, "name").text == "org/tiny <b>")
    yield browser
    assert [line for line in browser.get_log("browser") if "favicon" not in line["message"]] == []


def find(page, id):
    return page.find_element("id", id)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def settings(page, **values):
    page.find_element("tag name", "summary").click()
    for name, value in values.items():
        field = find(page, name)
        field.clear()
        field.send_keys(str(value))
    page.find_element("tag name", "summary").click()


def idle(page):
    return find(page, "go").is_displayed() and not find(page, "stop").is_displayed()


def test_a_text_goes_on_and_can_be_taken_back(server, page):
    served, _ = server
    if served.text.chat_template:
        find(page, "to-write").click()
    text = find(page, "text")
    text.send_keys("creeps in")
    settings(page, temperature=0, max_tokens=20)
    find(page, "go").click()
    until(lambda: idle(page) and "20 tokens" in find(page, "status").text)
    ids = served.text.tokenizer.encode("creeps in", add_special_tokens=False).ids
    from olmo_jax.generate.engine import Request, generate_batch

    [done] = generate_batch(init(CONFIG), [Request(tuple(ids), 20)])
    more = served.text.tokenizer.decode(done.token_ids, skip_special_tokens=False)
    value = text.get_property("value")
    assert value == "creeps in" + more.replace("\r\n", "\n").replace("\r", "\n")
    mark = page.find_element("css selector", "mark")
    assert value.endswith(mark.get_property("textContent"))
    find(page, "undo").click()
    assert text.get_property("value") == "creeps in"


def test_stop_ends_it_here_and_in_the_engine(server, page, engine):
    served, _ = server
    if served.text.chat_template:
        find(page, "to-write").click()
    find(page, "text").send_keys("a")
    settings(page, max_tokens=60)
    engine.open.clear()
    try:
        find(page, "go").click()
        until(lambda: served.driver.open == 1)
        find(page, "stop").click()
        until(lambda: idle(page) and find(page, "status").text == "stopped")
        until(lambda: served.driver.open == 0)
    finally:
        engine.open.set()


def test_an_error_is_told(server, page):
    served, _ = server
    if served.text.chat_template:
        find(page, "to-write").click()
    find(page, "text").send_keys("a")
    settings(page, max_tokens=1000)
    find(page, "go").click()
    until(lambda: "at most 64 fit" in find(page, "error").text)
    assert find(page, "text").get_property("value") == "a"
    assert [line["level"] for line in page.get_log("browser")] == ["SEVERE"]  # the 400 itself


def test_a_conversation_is_shown_as_text(server, page):
    served, _ = server
    if not served.text.chat_template:
        assert not find(page, "tabs").is_displayed()
        return
    settings(page, temperature=0, max_tokens=8)
    page.execute_script("document.getElementById('say').value = arguments[0]", NASTY)
    find(page, "go").click()
    until(lambda: idle(page) and "8 tokens" in find(page, "status").text)
    mine, answer = page.find_elements("class name", "turn")
    assert mine.text == NASTY and page.title == "org/tiny <b>"
    assert answer.get_property("textContent")
    assert page.find_elements("css selector", "#talk img") == []
    find(page, "undo").click()
    assert page.find_elements("class name", "turn") == []
