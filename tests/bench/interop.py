"""`make bench`: the quickstart's quantized models in every reader that runs here. Writes docs/results/interop.md.

Takes the latest run of QUENCH_HOME (default .quench; `make quickstart` makes one) and the environments autoawq and
autogptq (`make env-autoawq env-autogptq`). Everything new is made in a temporary folder.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from recipes.schemes.limits import ARCHIVED
from recipes.schemes.slugs import by_backend, parse_scheme
from tasks.quantize import ENVIRONMENTS
from tasks.runtime.process.environments import environment_problem, locked_versions
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.step import hardware
from tests.interop.agreement import (
    KL_LIMIT,
    TOP1_LIMIT,
    Agreement,
    compare,
    exllamav2,
    off_definition,
    off_layout,
    vllm_awq,
    vllm_gptq,
)
from tests.interop.exchange import READS, form, read_by, shifted, write_by, write_rows

RESULTS = CHECKOUT / "docs" / "results" / "interop.md"
OURS = ("awq-w4-g128", "gptq-w4-g128", "gptq-w3-g128")
THEIRS = (("awq-w4-g128", "autoawq"), ("gptq-w4-g128-actorder", "auto-gptq"))
DAMAGED = ("awq-w4-g128", "gptq-w4-g128")
DAMAGES = ("zero point", "group")
LAYOUTS = {"gptq": {"ExLlamaV2": exllamav2, "vLLM": vllm_gptq}, "awq": {"vLLM": vllm_awq}}


class Line(NamedTuple):
    """What one reader makes of one file."""

    name: str
    reader: str
    kernel: str
    off: int
    agreement: Agreement

    def __str__(self) -> str:
        found = self.agreement
        verdict = "" if self.reader == "transformers-default" else "holds" if found.holds else "**does not**"
        equal = found.layers - len(found.unequal)
        cells = [self.name, self.reader, self.kernel, f"{equal} / {found.layers}", f"{found.kl:.1e}"]
        cells += [f"{found.worst_kl:.1e}", f"{found.top1:.4f}", verdict]
        return f"| {' | '.join(cells)} |"


def artifacts(home: Path) -> dict[str, Path]:
    """Folders of the latest run's artifacts, by key."""
    steps = json.loads((home / "runs" / "latest" / "steps.json").read_text(encoding="utf-8"))["steps"]
    return {step["key"]: home / step["path"] / "files" for step in steps}


def written(made: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Files by GPTQModel and Quench from the run; by the archived packages made here; and damaged copies."""
    of = {key.partition("/")[0]: path for key, path in made.items()}
    files = {slug: made[f"quantize/{slug}"] for slug in OURS}
    for slug, backend in THEIRS:
        scheme = by_backend(parse_scheme(slug), backend)
        model = made["merge/quickstart-dequantized"]
        files[scheme.slug] = write_by(scheme, model, of["calibrate"], folder / scheme.slug)
        print("wrote", scheme.slug, flush=True)
    for slug in DAMAGED:
        for what in DAMAGES:
            files[f"{slug}, {what}"] = shifted(made[f"quantize/{slug}"], folder / f"{slug} {what}", what=what)
    return files


def writer(name: str) -> str:
    """Who reads a file as it was meant."""
    return next((backend for backend in ENVIRONMENTS if name.endswith(f".{backend}")), "transformers")


def measured(files: dict[str, Path], rows: Path, folder: Path) -> list[Line]:
    """Every file in every reader of its form, against its writer's own reading."""
    kernels = {}
    for reader, forms in READS.items():
        readable = {name: path for name, path in files.items() if form(path) in forms}
        if reader == "transformers-default":
            readable = {name: path for name, path in readable.items() if "," not in name}
        kernels[reader] = read_by(reader, readable, rows, folder / reader)
        print("read by", reader, flush=True)
    lines = []
    for name, path in files.items():
        slug = name.partition(",")[0]
        for reader in READS:
            if name in kernels[reader]:
                read = folder / reader / name
                off = len(off_definition(path, read / "weights.safetensors"))
                agreement = compare(folder / writer(name) / slug, read)
                lines.append(Line(name, reader, kernels[reader][name], off, agreement))
    return lines


def by_arithmetic(files: dict[str, Path]) -> list[str]:
    """Rows of the table of engines that do not run here."""
    lines = []
    for name, path in files.items():
        if "," in name or "w3" in name:  # 4 bits are what ExLlamaV2 reads, and vLLM of symmetric files
            continue
        for engine, layout in LAYOUTS[form(path)].items():
            if engine != "ExLlamaV2" or "actorder" not in name:  # it reorders such layers first
                off = off_layout(path, layout)
                lines.append(f"| {name} | {engine} | {'equal' if not off else f'{len(off)} layers differ'} |")
    return lines


HEAD = ["| file | reader | kernel | equal layers | mean KL, nats | largest KL | top-1 | |"]
HEAD += ["| --- | --- | --- | ---: | ---: | ---: | ---: | --- |"]


def page(lines: list[Line], arithmetic: list[str]) -> str:
    """The page."""
    whole = [line for line in lines if "," not in line.name]
    plain = [line for line in whole if line.reader != "transformers-default"]
    default = [line for line in whole if line.reader == "transformers-default"]
    damaged = [line for line in lines if "," in line.name]
    off = sum(line.off for line in plain)
    machine, main = hardware(), locked_versions()
    gptq, awq = locked_versions("autogptq"), locked_versions("autoawq")
    layers, tokens, newline = sum(line.agreement.layers for line in plain), whole[0].agreement.tokens, "\n"
    return f"""<!-- Written by `python -m tests.bench.interop`, a part of `make bench`. -->
# Interoperation, measured

The quickstart's merged model, quantized by Quench's default (GPTQModel) and by the archived originals
(`.autoawq`, `.auto-gptq`), read in fp16 on the CPU by

* `transformers` {main["transformers"]} with its kernels in plain torch,
* `autoawq`: AutoAWQ {awq["autoawq"]} with transformers {awq["transformers"]}, its path in plain torch,
* `auto-gptq`: AutoGPTQ {gptq["auto-gptq"]} with transformers {gptq["transformers"]}.

`equal layers`: dequantized weights, taken through the reader's forward pass, equal bit for bit to those that the
writer's own package reads. KL(writer || reader) over the {tokens} tokens of 30 test rows. A row holds with all layers
equal, a mean KL below {KL_LIMIT:g} nats and top-1 of at least {TOP1_LIMIT}.

{newline.join(HEAD + [str(line) for line in plain])}

Layers that are not (code - zero point) x scale of the files, rounded once to fp16: {off} of {layers}.

## One wrong number is noticed
In a copy, the first zero point of one layer is changed by one, or the scales of its first two groups change places.

{newline.join(HEAD + [str(line) for line in damaged])}

## The kernel that transformers takes by itself
On a CPU, 4-bit layers go to ATen's int4 kernel (`TorchAten...`), which rounds scales to bf16 (up to 0.4 % off) and
computes in bf16: no layer is bit for bit the file's. What is measured on a CPU differs from other engines by this much.

{newline.join(HEAD + [str(line) for line in default])}

## Engines that do not run here
By the arithmetic of their sources alone, not run: ExLlamaV2's `reconstruct_gptq_kernel` and vLLM's `uint4b8` and
`awq_dequantize_kernel`, applied to the files, against (code - zero point) x scale.

| file | engine | weights |
| --- | --- | --- |
{newline.join(arithmetic)}

## What does not work
* AutoAWQ reads only AWQ files. AutoGPTQ repacks AWQ files as it loads them, on a GPU; here its tensors stay on the
  CPU.
* AutoGPTQ takes the output layer from the file, where its own files of models with tied embeddings have it a second
  time. Without one it ties the embeddings to an output layer that was never filled, and answers noise without a
  word (mean KL of 6.8 nats, or NaN, on this model, with every quantized layer equal). So the copy that it reads here
  has one.
* AutoGPTQ quantizes Llama, Mistral, Qwen2 and Gemma models, AutoAWQ also Qwen3 and Gemma 2; `quench check` refuses
  others.
* Files from AutoGPTQ are written under the input's names: its own would untie tied embeddings, add a bias of zeros to
  every layer and have a name that transformers does not look for.
* Scales are fp16 in both formats: a scale found in fp32 is rounded when it is written, and codes are found on the
  rounded one. Norms that AutoAWQ scaled are stored in fp16.
* transformers 4 does not know `rope_parameters` and takes a theta of 10,000 without a word; Quench's files spell both.

{machine["cpu"]}, {machine["cores"]} cores; torch {main["torch"]}, GPTQModel {main["gptqmodel"]}.
"""


def main() -> None:
    """Measure, write the page."""
    problems = [problem for name in map(ENVIRONMENTS.get, ARCHIVED) if (problem := environment_problem(name))]
    if problems:
        raise SystemExit("\n".join(map(str, problems)))
    made = artifacts(Path(os.environ.get("QUENCH_HOME", CHECKOUT / ".quench")))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = written(made, folder)
        rows = write_rows(
            next(path for key, path in made.items() if key.startswith("prepare/")), folder / "rows.parquet"
        )
        lines = measured(files, rows, folder)
        RESULTS.write_text(page(lines, by_arithmetic(files)), encoding="utf-8")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
