"""Progress where nobody watches a bar: lines that say something, and few of them."""

import pytest

from llmtool.cli import output
from llmtool.cli.output import Output


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(output, "time", made)
    return made


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capfd.readouterr()
    assert out == ""
    return err.splitlines()


def test_what_takes_its_time_goes_on(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Output().progress() as update:
        for i in range(101):
            update(f"bench: {i} of 100 requests", i / 100)
            clock.now += 0.2
    assert lines(capfd) == [f"bench: {i} of 100 requests" for i in range(0, 101, 10)]


def test_what_ends_at_once_is_said_once(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Output().progress() as update:
        for i in range(101):
            update("Loading weights", i / 100)
            clock.now += 0.005
        update("Warming up", 1.0)
    assert lines(capfd) == ["Loading weights", "Warming up"]


def test_a_text_without_figures_gets_them(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Output().progress() as update:
        for i in range(0, 101, 25):
            update("Loading weights", i / 100)
            clock.now += 2.0
    assert lines(capfd) == ["Loading weights", *(f"Loading weights: {i}%" for i in (25, 50, 75, 100))]


def test_what_stands_still_says_so_now_and_then(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with Output().progress() as update:
        for _ in range(31):
            update("Waiting", None)
            clock.now += 1.0
    assert lines(capfd) == ["Waiting"] * 4


def test_quiet_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with Output(quiet=True).progress() as update:
        update("Loading weights", 0.5)
    assert lines(capfd) == []
