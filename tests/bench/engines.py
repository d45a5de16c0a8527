"""`python -m tests.bench.engines [PACKAGE]`: where the table of engines and an installed vLLM differ.

PACKAGE is a folder `.../site-packages/vllm`; default: that of .envs/vllm (`make env-vllm`). Nothing of it is imported,
so the wheel for GPUs is read on a machine without one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from recipes.models.linear import Linear
from recipes.schemes.engines import CPU_TILE, TILES, cautions, cpu_refusals
from recipes.schemes.ranks import VOCABULARY, ServedModel
from recipes.schemes.reads import VLLM, Reads, rows_for
from recipes.schemes.scheme import GROUP_SIZES, PER_CHANNEL, Form, Grid, Scheme
from recipes.schemes.slugs import parse_scheme
from tasks.runtime.process.launch import CHECKOUT
from tests.bench.engine_source import AVX2, AVX512, MARLIN_UTILS, QUANTIZATION, Source

BITS = range(2, 9)
GROUPS = (PER_CHANNEL, *GROUP_SIZES)
GPUS = (70, 75, 80, 89, 90, 100)  # Volta, Turing, Ampere, Ada, Hopper, Blackwell
WIDE = (4096, 4096)  # a layer that every kernel has tiles for
KERNELS = {"MarlinLinearKernel": "Marlin", "MacheteLinearKernel": "Machete", "HummingLinearKernel": "Humming"}
GPTQ, AWQ = f"{QUANTIZATION}/auto_gptq.py", f"{QUANTIZATION}/auto_awq.py"
WNA16 = f"{QUANTIZATION}/compressed_tensors/schemes/compressed_tensors_wNa16.py"


class Difference(NamedTuple):
    """A cell in which table and source differ."""

    cell: str
    table: str
    source: str

    def __str__(self) -> str:
        return f"{self.cell}: the table says {self.table or 'no'}, the source {self.source or 'no'}"


class Cell(NamedTuple):
    """A file's format and grid."""

    form: Form
    grid: Grid

    def __str__(self) -> str:
        group = "per channel" if self.grid.group_size == PER_CHANNEL else f"groups of {self.grid.group_size}"
        points = "without" if self.grid.symmetric else "with"
        return f"{self.form}, {self.grid.bits} bits {points} zero points, {group}"

    @property
    def row(self) -> Reads | None:
        """The table's row for it."""
        return next((row for row in rows_for("vllm", self.form) if row.takes(self.grid)), None)


def cells() -> Iterator[Cell]:
    """Every format whose rows come from vLLM's own source, with every grid that it can spell."""
    forms: tuple[Form, ...] = ("gptq", "awq", "compressed-tensors")
    for form, bits, group, symmetric in product(forms, BITS, GROUPS, (True, False)):
        if form != "awq" or not symmetric:  # AWQ files have zero points
            yield Cell(form, Grid(bits, group, symmetric))


def differences(source: Source) -> Iterator[Difference]:
    """Every cell in which they differ."""
    if source.version != VLLM:
        yield Difference("version", VLLM, source.version)
    for cell in cells():
        yield from _of_gpus(source, cell)
        yield from _of_cpu(source, cell)
    yield from _of_order(source)
    yield from _of_tiles(source)
    yield from _of_cpu_tiles(source)
    yield from _of_heads(source)
    yield from _of_the_rest(source)


def weights(source: Source, cell: Cell) -> str | None:
    """The type that vLLM has for these weights; None where it refuses them by their bits."""
    bits, symmetric = cell.grid.bits, cell.grid.symmetric
    if cell.form == "gptq":
        return source.types(GPTQ, "TYPE_MAP", inside="AutoGPTQConfig").get((bits, symmetric))
    if cell.form == "awq":
        return source.types(AWQ, "TYPE_MAP", inside="AutoAWQConfig").get(bits)
    return source.types(WNA16, f"WNA16{'' if symmetric else '_ZP'}_SUPPORTED_TYPES_MAP").get(bits)


def _least(source: Source, form: Form) -> int:
    """The lowest GPU that vLLM lets a format onto, before any kernel is asked."""
    by_form = {"gptq": (GPTQ, "AutoGPTQConfig"), "awq": (AWQ, "AutoAWQConfig")}
    return source.least_capability(*by_form.get(form, (WNA16, "CompressedTensorsWNA16")))


def _of_gpus(source: Source, cell: Cell) -> Iterator[Difference]:
    kind, row, group, points = weights(source, cell), cell.row, cell.grid.group_size, not cell.grid.symmetric
    for gpu in GPUS:
        kernel = experts = ""
        if kind is not None and gpu >= _least(source, cell.form):
            kernel = _kernel_for(source, cell, gpu)
            experts = source.experts_kernel(gpu, kind, group=group, points=points, form=cell.form)
        kernel = KERNELS.get(kernel, kernel)
        where = f"{cell}, GPU {gpu / 10:.1f}"
        if kernel not in (told := _kernels(row, gpu)):
            yield Difference(where, " or ".join(told), kernel)
        reads = row is not None and gpu >= row.gpu and row.takes_experts(cell.grid)
        if reads != bool(experts):
            yield Difference(f"{where}, experts", "yes" if reads else "", experts)


def _kernel_for(source: Source, cell: Cell, gpu: int | None) -> str:
    """Of a wide layer, as the format's own class looks for it."""
    kind, group = weights(source, cell) or "", cell.grid.group_size
    if cell.form == "gptq" and not source.marlin_takes(gpu, kind, group=group):
        return ""
    return source.kernel(gpu, kind, group=group, points=not cell.grid.symmetric, shape=WIDE)


def _kernels(row: Reads | None, gpu: int) -> tuple[str, ...]:
    """What the table allows there: the plain kernel, on Hopper also the one that is named for it."""
    if row is None or gpu < row.gpu:
        return ("",)
    plain, _, hopper = row.kernel.partition("; ")
    return (plain, hopper.removesuffix(" on Hopper")) if gpu == 90 and hopper else (plain,)


def _of_cpu(source: Source, cell: Cell) -> Iterator[Difference]:
    kernel = "" if weights(source, cell) is None else _kernel_for(source, cell, None)
    told = cell.row is not None and not cpu_refusals(_scheme(cell), _layer(*WIDE), avx512=True)
    if told != bool(kernel):
        yield Difference(f"{cell}, CPU", "yes" if told else "", kernel)


def _scheme(cell: Cell) -> Scheme:
    return Scheme(slug="tried", method="rtn", grid=cell.grid, backend="quench-rtn", form=cell.form)


def _layer(inputs: int, outputs: int) -> ServedModel:
    return ServedModel((Linear("model.layers.0.mlp.fc1", inputs, outputs),))


def _of_order(source: Source) -> Iterator[Difference]:
    for group in GROUPS:
        cell = Cell("gptq", Grid(4, group, True))
        told = cell.row is not None and cell.row.takes_order(cell.grid)
        if told != source.takes_order(group):
            yield Difference(f"{cell}, activation order", "yes" if told else "", "" if told else "yes")


def _of_tiles(source: Source) -> Iterator[Difference]:
    sides = sorted({side for tile in TILES for side in (tile[0] // 2, tile[0], tile[0] * 3 // 2)})
    for inputs, outputs in product(sides, sides):
        told = bool(cautions(parse_scheme("gptq-w4"), _layer(inputs, outputs), engine="vllm"))
        if told != source.padded(outputs, inputs):
            yield Difference(f"Marlin pads {inputs} x {outputs}", str(told), str(not told))


def _of_cpu_tiles(source: Source) -> Iterator[Difference]:
    for inputs, outputs in product((CPU_TILE // 2, CPU_TILE, CPU_TILE * 3 // 2), repeat=2):
        told = not cpu_refusals(parse_scheme("gptq-w4"), _layer(inputs, outputs), avx512=True)
        kernel = source.kernel(None, "uint4b8", group=PER_CHANNEL, points=False, shape=(inputs, outputs))
        if told != bool(kernel):
            yield Difference(f"a layer of {inputs} x {outputs} on a CPU", "yes" if told else "", kernel)


def _of_heads(source: Source) -> Iterator[Difference]:
    rules = {
        "config/model.py": (r"total_num_attention_heads % tensor_parallel_size != 0",),
        "model_executor/layers/linear.py": (
            r"self\.num_heads = divide\(self\.total_num_heads, tp_size\)",
            r"if tp_size >= self\.total_num_kv_heads:\s+self\.num_kv_heads = 1\s+"
            r"self\.num_kv_head_replicas = divide\(tp_size, self\.total_num_kv_heads\)",
            r"self\.num_kv_heads = divide\(self\.total_num_kv_heads, tp_size\)",
        ),
        "model_executor/layers/vocab_parallel_embedding.py": (
            rf"DEFAULT_VOCAB_PADDING_SIZE = {VOCABULARY}\n",
            r"self\.num_embeddings_per_partition = divide\(\s*self\.num_embeddings_padded, self\.tp_size\s*\)",
        ),
        MARLIN_UTILS: (r"is_channelwise = group_size == -1\s+return is_channelwise and is_row_parallel",),
    }
    for path, patterns in rules.items():
        yield from (Difference(f"shares of ranks, {path}", pattern, "") for pattern in source.says(path, *patterns))


def _of_the_rest(source: Source) -> Iterator[Difference]:
    for row in rows_for("vllm", "bitsandbytes"):
        if bool(row.needs) == ("bitsandbytes" in source.methods()):
            yield Difference(f"bitsandbytes of {row}", row.needs or "built in", "the reverse")
    for library, told in ((AVX2, False), (AVX512, True)):
        if (there := source.in_library("cpu_gemm_wna16", library)) not in (None, told):
            yield Difference(f"4-bit weights in {library}", str(told), str(there))


def installed() -> Path | None:
    """The package in .envs/vllm."""
    return next(iter((CHECKOUT / ".envs" / "vllm").glob("lib/python3*/site-packages/vllm")), None)


def main() -> int:
    """Print every difference; 1 where there is one, 2 where there is nothing to read."""
    package = Path(sys.argv[1]) if sys.argv[1:] else installed()
    if package is None or not (package / QUANTIZATION).is_dir():
        print(f"There is no vLLM in {package or '.envs/vllm'}. Run: make env-vllm", file=sys.stderr)
        return 2
    source = Source(package)
    unequal = list(differences(source))
    for difference in unequal:
        print(difference)
    if not unequal:
        print(f"vLLM {source.version}: table and source differ in no cell of {len(list(cells()))} formats and grids.")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
