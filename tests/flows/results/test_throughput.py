"""Speeds of an engine: the place of each arm, and the time to the first token."""

from __future__ import annotations

from typing import Any

import pytest

from flows.results.throughput import loads_of, ranks


def load(requests: int, decode: list[float], ttft: list[float] | None = None) -> dict[str, Any]:
    """A load of served.json."""
    return {
        "requests": requests,
        "prompt_tokens": 128,
        "new_tokens": 32,
        "prefill_tokens_per_s": [9000.0, 9100.0, 9050.0],
        "output_tokens_per_s": decode,
        "ttft_s": ttft or [0.1],
    }


def arm(**decode: list[float]) -> dict[str, Any]:
    """An arm's part of the section, from requests -> repeats."""
    return {"loads": loads_of({"loads": [load(int(name[1:]), values) for name, values in decode.items()]})}


def test_arms_that_cannot_be_told_apart_share_a_place() -> None:
    arms = {
        "slow": arm(r32=[1000.0, 1010.0, 990.0]),
        "fast": arm(r32=[3000.0, 3030.0, 2970.0]),
        "too": arm(r32=[3010.0, 2950.0, 3040.0]),
    }
    assert ranks(arms) == {"slow": 3, "fast": 1, "too": 1}


def test_the_place_is_that_at_the_most_requests_that_all_were_timed_at() -> None:
    """At 32 one of them was timed once: no interval, so 8 decides."""
    arms = {
        "a": arm(r1=[10.0, 10.1], r8=[100.0, 100.1], r32=[200.0, 200.1]),
        "b": arm(r1=[20.0, 20.1], r8=[90.0, 90.1], r32=[900.0]),
    }
    assert ranks(arms) == {"a": 1, "b": 2}
    assert arms["b"]["loads"][2]["output_tokens_per_s"]["reason"].startswith("timed 1 times")
    assert ranks({"a": arm(r32=[5.0]), "b": arm(r32=[6.0])}) == {} and ranks({}) == {}


def test_the_tail_is_a_request_that_was_there() -> None:
    (found,) = loads_of({"loads": [load(32, [1.0, 1.0], [float(n) for n in range(1, 101)])]})
    assert found["ttft_s"] == {"median": 50.5, "p95": 95.0, "n": 100}
    (few,) = loads_of({"loads": [load(1, [1.0, 1.0], [0.3, 0.1, 0.2])]})
    assert few["ttft_s"] == {"median": 0.2, "p95": 0.3, "n": 3}
    assert few["output_tokens_per_s"]["value"] == pytest.approx(1.0)
    (none,) = loads_of({"loads": [{**load(1, [1.0, 1.0]), "ttft_s": []}]})
    assert none["ttft_s"] == {"median": None, "p95": None, "n": 0}
