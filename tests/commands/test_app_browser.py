"""The page in a browser: draw a digit, move a slider, see the numbers change; nothing is asked of any other machine."""

import importlib.util
import socket

import pytest

from support.browser import browser, requests_elsewhere, served
from support.small_demo import write_demo

# the page is served by another process: gradio, once imported, leaves event loops open
pytestmark = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")

NUMBERS = "[...document.querySelectorAll('#answers .loca-number')].map(number => number.innerText).join()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "loca-demo")


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def numbers(page):
    """The probabilities of both columns."""
    return page.evaluate(NUMBERS)


def column(page, name):
    return page.locator(f"#answers td.{name} .loca-number").all_inner_texts()


def after(page, act):
    """Act, and wait until there are other answers; a stroke begins with an empty canvas, which has none."""
    before = numbers(page)
    act()
    page.wait_for_function(f"before => {NUMBERS} && {NUMBERS} !== before", arg=before, timeout=30_000)
    page.wait_for_function("!document.querySelector('.generating')", timeout=30_000)


def opened(chromium, address):
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    asked = requests_elsewhere(page, address)
    page.goto(address)
    page.wait_for_selector("#canvas canvas", timeout=30_000)
    page.wait_for_selector("#examples img", timeout=30_000)
    return page, asked


def draw(page):
    box = page.locator("#canvas canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 80)
    page.mouse.down()
    page.mouse.move(x + 60, y - 80, steps=3)
    page.mouse.move(x - 10, y + 90, steps=3)
    page.mouse.up()


def strength(page, value):
    page.fill("#strength input[type=number]", value)
    page.keyboard.press("Tab")


def test_draw_move_see(folder, port):
    with browser() as chromium, served(folder.parent, folder.name, "--port", port) as address:
        page, asked = opened(chromium, address)
        after(page, lambda: draw(page))
        base, adapter = column(page, "base"), column(page, "adapter")
        assert len(base) == len(adapter) == 10 and base != adapter

        after(page, lambda: strength(page, "0.3"))
        assert column(page, "base") == base and column(page, "adapter") != adapter

        other, _ = opened(chromium, address)
        assert other.input_value("#strength input[type=number]") == "1"
        after(other, lambda: other.locator("#examples button").nth(4).click())
        there = numbers(other)
        after(page, lambda: strength(page, "1"))
        assert (column(page, "base"), column(page, "adapter")) == (base, adapter)
        assert numbers(other) == there

        other.get_by_role("tab", name="Upload").click()
        wrong = {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}
        other.set_input_files("#upload input[type=file]", wrong)
        other.get_by_text("cannot be read as an image").wait_for(timeout=30_000)
        assert asked == []
