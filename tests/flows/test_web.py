"""The pages in a real browser: voted with keys alone, streamed side by side, and no request leaves the machine."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.web import demo_app, human_app
from tasks.human import HumanStudy, Item, new_study, results, votes_of
from tasks.report import write_report
from tests.browser import Browser, needs_chromium, served
from tests.recorded import record_run

pytestmark = needs_chromium


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as browser:
        yield browser


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go: `$SCREENSHOTS` keeps them."""
    return Path(os.environ.get("SCREENSHOTS") or tmp_path / "screenshots")


@pytest.fixture
def study(home: Path) -> HumanStudy:
    texts = {"q1": "Explain <b>tides</b> & moons.", "q2": "Name a prime number."}
    items = [
        Item(item=key, instruction=text, input=None, a=f"alpha {key}", b=f"beta {key}") for key, text in texts.items()
    ]
    return new_study("student", "gpt", items, seed=1)


def test_a_person_votes_with_the_keyboard_and_can_go_back(study: HumanStudy, browser: Browser, pictures: Path) -> None:
    with served(human_app(study)) as address:
        browser.open(address)
        browser.type("ann")
        browser.key("Enter")
        browser.until("!document.getElementById('vote').hidden")
        assert browser.js("document.getElementById('ask').textContent") == study.items[0].instruction, (
            "text, not markup"
        )
        browser.screenshot(pictures / "human-eval.png")
        for number, key in enumerate(("1", "ArrowDown", "ArrowRight"), 1):
            browser.key(key)
            browser.until(f"items.flatMap(item => Object.keys(item.votes)).length === {number}")
            assert len(votes_of(study)) == number, "a vote that the page shows is on disk"
        browser.until("document.getElementById('count').textContent === '2 of 2, 1 done'")
        browser.key("Backspace")
        browser.until("document.getElementById('count').textContent.startsWith('1 of 2')")
        browser.key("3")  # another mind about the first aspect
        browser.until("document.getElementById('count').textContent.startsWith('2 of 2')")
        assert {vote.choice for vote in votes_of(study).values() if vote.aspect == "helpful"} == {"second"}
        # Another voter on the same study; the first one's votes are their own.
        browser.open(address)
        browser.type("bob")
        browser.key("Enter")
        browser.until("document.getElementById('count').textContent === '1 of 2, 0 done'")
        assert browser.strangers(address) == []
    assert results(study)["helpful"].votes == 1


def test_the_votes_of_the_page_are_in_the_report(study: HumanStudy, browser: Browser) -> None:
    with served(human_app(study)) as address:
        browser.open(address)
        browser.type("ann")
        browser.key("Enter")
        browser.until("!document.getElementById('vote').hidden")
        for number in range(1, 7):
            browser.key("2")
            browser.until(f"items.flatMap(item => Object.keys(item.votes)).length === {number}")
        browser.until("!document.getElementById('done').hidden")
    done = CliRunner().invoke(app, ["human-eval", "report", "--json"])
    assert json.loads(done.stdout)["aspects"]["harmless"]["ties"] == 2


def test_the_demo_streams_student_and_teacher_side_by_side(browser: Browser, pictures: Path) -> None:
    def answer(words: str, messages: Sequence[dict[str, str]]) -> Iterator[str]:
        for word in f"{words} to turn {len(messages)}".split():
            time.sleep(0.1)
            yield word + " "

    def of(words: str) -> object:
        return lambda messages: answer(words, messages)

    app = demo_app(
        {"student": of("Small answer"), "teacher": of("Large answer")}, {"student": "mine/2", "teacher": "big"}
    )  # type: ignore[dict-item]
    with served(app) as address:
        browser.open(address)
        browser.type("Hello?")
        browser.key("Enter")
        browser.until("document.getElementById('student').lastChild.textContent === 'Small '")  # before it is whole
        browser.until("document.getElementById('teacher').textContent.includes('Large answer to turn 1')")
        browser.until("busy === 0")
        browser.type("And more?")
        browser.key("Enter")
        browser.until("document.getElementById('student').textContent.includes('Small answer to turn 3')")
        browser.until("busy === 0")
        browser.screenshot(pictures / "demo.png")
        assert browser.js("document.getElementById('name-student').textContent") == "mine/2"
        assert browser.strangers(address) == []


def test_the_report_opens_without_network_in_light_and_in_dark(home: Path, browser: Browser, pictures: Path) -> None:
    page = write_report(record_run()).as_uri()
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open(page)
        browser.screenshot(pictures / f"report-{scheme}.png")
        background = browser.js("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(21, 24, 28)") == (scheme == "dark")
        assert browser.js("document.querySelectorAll('svg').length") >= 6
        assert browser.js("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
    assert browser.strangers("file:") == []
