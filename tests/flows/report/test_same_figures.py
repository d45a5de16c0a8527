"""report.json of a fixed run, key by key: a change of code that is to change no figure changes none.

Where a figure is meant to change, `python -m tests.flows.report.test_same_figures` writes the file anew; the commit
says why. Floats are compared to nine significant digits: the last ones depend on the processor's matrix product.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from flows.report.build import render
from recipes.arms import KV_CACHES
from tests.flows.synthetic_run import SHAPES, Shape, SyntheticRun

DIGESTS = Path(__file__).parent / "same_figures.json"
SCHEME = "gptq-w4-g128"
SAME_FILES = ("quantized", 5.6e-4, 7.2e-4, 0.895, 4_716_000, "dequantized", SCHEME)
BROKEN = {"what": "Scales are NaN.", "where": "layers.3", "why": "a channel is zero", "next": "raise calibrate.rows"}


def run(home: Path) -> Path:
    """A run that has every kind of arm but external ones, and whatever leaves a cell empty."""
    shapes = {
        **SHAPES,
        "base-nf4": Shape("nf4", 6.9, 6.55, 0.002, None),
        f"{SCHEME}.calib-random": Shape(*SAME_FILES, calibration="random"),
        "awq-w4-g128.on-base": Shape("quantized", 1, 1, 1, None, None, "awq-w4-g128", True, unavailable="no DoRA here"),
        **{f"{SCHEME}.kv-{kv}": Shape(*SAME_FILES, kv=kv) for kv in KV_CACHES},
    }
    return SyntheticRun(
        home,
        test=160,
        general=40,
        shapes=shapes,
        broken={"quantize/gptq-w4-g32": BROKEN},
        refused={"rtn-w3-g128": "vLLM does not read it."},
        drop_rows=frozenset({"rtn-w4-g128"}),
        nan_rows=frozenset({"gptq-w3-g128"}),
    ).write()


def rounded(value: Any) -> Any:
    """With floats to nine significant digits."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def digests(home: Path) -> dict[str, str]:
    """Top-level key of report.json -> sha256 of its value, the order of keys included."""
    folder = run(home)
    render(folder, home)
    report = json.loads((folder / "report.json").read_text())
    return {key: hashlib.sha256(json.dumps(rounded(value)).encode()).hexdigest() for key, value in report.items()}


def test_every_key_of_report_json_is_as_it_was(tmp_path: Path) -> None:
    expected = json.loads(DIGESTS.read_text())
    found = digests(tmp_path)
    assert [key for key in expected if found.get(key) != expected[key]] == []
    assert list(found) == list(expected)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        DIGESTS.write_text(json.dumps(digests(Path(folder)), indent=1) + "\n", encoding="utf-8")
