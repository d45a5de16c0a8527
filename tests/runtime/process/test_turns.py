"""Who goes first of those who wait."""

from __future__ import annotations

import threading
import time

import pytest

from tasks.runtime.process.turns import Turns

SOON_S = 30


def test_the_most_urgent_goes_first_and_of_equals_who_came_first() -> None:
    turns, order = Turns(), list[str]()
    told: list[str] = []

    def go(name: str, urgency: float) -> None:
        with turns.turn(urgency, waits=lambda: told.append(name)):
            order.append(name)

    threads: list[threading.Thread] = []
    with turns.turn(0.0, waits=lambda: told.append("nobody was there")):
        for name, urgency in (("low", 1.0), ("first", 5.0), ("second", 5.0), ("top", 9.0)):
            threads.append(threading.Thread(target=go, args=(name, urgency)))
            threads[-1].start()
            deadline = time.monotonic() + SOON_S
            while name not in told:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join(SOON_S)
    assert order == ["top", "first", "second", "low"] and len(told) == 4


def test_a_stop_ends_the_waiting_and_others_go_on() -> None:
    turns, stop = Turns(), threading.Event()
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            with turns.turn(9.0, stop=stop):
                raise AssertionError("it had its turn")
        except InterruptedError as error:
            ended.append(error)

    with turns.turn(0.0):
        thread = threading.Thread(target=wait)
        thread.start()
        stop.set()
        thread.join(SOON_S)
    assert len(ended) == 1
    with turns.turn(0.0):  # nobody more urgent is left
        pass


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="mine"), turns.turn(0.0):
        raise ValueError("mine")
    with turns.turn(0.0):
        pass
