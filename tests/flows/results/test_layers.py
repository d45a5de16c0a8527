"""Which layers suffer: read from quantize.json, drawn with every scheme named, absent where nothing was measured."""

from __future__ import annotations

import json
from pathlib import Path

from flows.report.build import render
from flows.report.plots.layers import errors_plot, weights_plot
from flows.results.layers import layers_of, lines, unmeasured, worst
from flows.results.read import read_run
from tests.flows.synthetic_run import SHAPES, SyntheticRun

QUANTIZED = [slug for slug, shape in SHAPES.items() if shape.scheme]


def test_every_quantized_arm_is_drawn_with_what_was_measured(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    report = render(run.write(), tmp_path).json
    layers = report["layers"]
    assert list(layers) == QUANTIZED
    drawn = {line.slug: line for line in lines(layers, "FFN")}
    assert {slug for slug, line in drawn.items() if not line.measured} == {"rtn-w4-g128", "rtn-w3-g128"}
    assert all(len(line.errors) == 24 for line in drawn.values())
    picture = errors_plot(layers)
    assert all(picture.count(f">{slug}<") == 1 for slug in QUANTIZED)
    assert "attention" in weights_plot(layers) and "FFN" in weights_plot(layers)
    page = (tmp_path / "runs" / report["id"] / "report.html").read_text()
    assert "Which layers suffer" in page


def test_the_worst_block_is_named(tmp_path: Path) -> None:
    block = {"layer": 0, "part": "self_attn", "weight_std": 0.02, "weight_error": None}
    blocks = [block | {"output_error": 0.1}, block | {"part": "mlp", "layer": 1, "output_error": 0.25}]
    assert worst({"gptq-w4-g128": {"blocks": blocks}}) == {"gptq-w4-g128": "FFN of layer 1: 25 %"}


def test_a_run_from_before_has_no_such_section(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    folder = run.write()
    for path in tmp_path.glob("store/quantize/*/files/quantize.json"):
        path.write_text(json.dumps({"layers": []}))
    render(folder, tmp_path)
    assert "Which layers suffer" not in (folder / "report.html").read_text()


def test_the_kernel_is_that_of_the_evaluation_where_the_writer_loads_nothing(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    folder = run.write()
    (path,) = tmp_path.glob("store/evaluate/rtn-w4-g128-*/manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"result": {**manifest["result"], "kernel": "TorchFusedLinear"}}))
    layers = layers_of(read_run(folder, tmp_path))
    assert layers["rtn-w4-g128"]["kernel"] == "TorchFusedLinear"
    assert layers["rtn-w3-g128"]["kernel"] is None and layers["gptq-w4-g128"]["kernel"] == "TorchLinear"


def test_errors_that_could_not_be_measured_are_said_with_the_reason(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path)
    folder = run.write()
    (path,) = tmp_path.glob("store/quantize/gptq-w4-g128-*/files/quantize.json")
    record = json.loads(path.read_text())
    blocks = [block | {"output_error": None, "activation_max": None} for block in record["blocks"]]
    path.write_text(json.dumps(record | {"blocks": blocks, "kernel": None, "no_errors": "out of memory (3 GiB)"}))
    report = render(folder, tmp_path).json
    assert unmeasured(report["layers"]) == {"gptq-w4-g128": "out of memory (3 GiB)"}
    page = (folder / "report.html").read_text()
    assert page.count("gptq-w4-g128: errors by layer were not measured: out of memory (3 GiB).") == 1
    path.write_text(json.dumps(record | {"blocks": [], "no_errors": "no room"}))
    assert unmeasured(layers_of(read_run(folder, tmp_path))) == {"gptq-w4-g128": "no room"}
