"""The longest chain of a plan: in seconds where all steps were made before, else in steps."""

from flows.plan.critical import Chain, behind, critical_path, sentence
from flows.plan.lookup import Planned

NEEDS = {
    "prepare/p": (),
    "train/t": ("prepare/p",),
    "calibrate/c": ("prepare/p",),
    "merge/m": ("train/t",),
    "evaluate/base": ("prepare/p",),
    "quantize/q": ("merge/m", "calibrate/c"),
    "evaluate/q": ("quantize/q",),
}
TOOK = {"prepare/p": 5.0, "train/t": 60.0, "calibrate/c": 1.0, "merge/m": 4.0, "evaluate/base": 200.0}
TOOK |= {"quantize/q": 20.0, "evaluate/q": 30.0}


def plan(*hits: str) -> list[Planned]:
    return [Planned(key=key, fingerprint="f" * 64, hit=key in hits, why="", needs=to) for key, to in NEEDS.items()]


def test_the_longest_chain_in_seconds_is_not_the_longest_in_steps():
    assert critical_path(plan(), TOOK) == Chain(["prepare/p", "evaluate/base"], 205.0)
    faster = TOOK | {"evaluate/base": 20.0}
    keys = ["prepare/p", "train/t", "merge/m", "quantize/q", "evaluate/q"]
    assert critical_path(plan(), faster) == Chain(keys, 119.0)
    assert (
        sentence(plan(), faster)
        == f"longest chain: {' -> '.join(keys)} (119 s of 2 min of work, as it took here before)"
    )


def test_without_every_second_steps_count_and_no_time_is_said():
    unknown = {key: seconds for key, seconds in TOOK.items() if key != "quantize/q"}
    keys, seconds = critical_path(plan(), unknown)
    assert keys == ["prepare/p", "train/t", "merge/m", "quantize/q", "evaluate/q"] and seconds is None
    assert sentence(plan(), unknown) == f"longest chain: {' -> '.join(keys)}"


def test_hits_are_no_part_of_it():
    hits = ("prepare/p", "train/t", "calibrate/c", "merge/m")
    assert critical_path(plan(*hits, "evaluate/base"), TOOK) == Chain(["quantize/q", "evaluate/q"], 50.0)
    assert sentence(plan(*NEEDS), TOOK) == "" and critical_path([], {}) == Chain([], 0.0)


def test_what_most_waits_for_goes_first():
    assert behind(plan(), TOOK) == {
        "prepare/p": 205.0,
        "evaluate/base": 200.0,
        "train/t": 114.0,
        "merge/m": 54.0,
        "calibrate/c": 51.0,
        "quantize/q": 50.0,
        "evaluate/q": 30.0,
    }
    in_steps = behind(plan("prepare/p"), {})
    assert in_steps["train/t"] == 4 and in_steps["calibrate/c"] == 3 and in_steps["evaluate/base"] == 1
    assert "prepare/p" not in in_steps
