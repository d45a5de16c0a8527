"""`make bench`: the streamed merge of synthetic checkpoints against a bare loop, PEFT and `cp`.

Writes docs/results/merge.md. Every figure is of a process of its own, imports included; the arms take turns.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tasks.runtime.process.environments import locked_versions
from tasks.runtime.process.launch import CHECKOUT, child_env
from tasks.runtime.process.leases import cpu_slots
from tasks.runtime.step import hardware
from tests.bench.apart import peak_kib
from tests.jobs.build import make_job

RESULTS = CHECKOUT / "docs" / "results" / "merge.md"
GIB = 1 << 30


class Size(NamedTuple):
    """A synthetic Llama, and how it is measured."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    repeats: int
    arms: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of its weights in bf16."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        return 2 * (self.layers * layer + 2 * self.vocabulary * self.hidden)


SIZES = (
    Size("1 B", 2048, 5632, 20, 32000, 3, ("cp", "imports", "stream", "bare", "peft")),
    Size("7 B", 4096, 11008, 32, 32000, 1, ("cp", "imports", "stream", "bare")),
)


class Timed(NamedTuple):
    """One process."""

    seconds: float
    cpu_seconds: float
    peak_gib: float


def bare(base: Path, adapter: Path, out: Path) -> None:
    """Read + quantize + dequantize + add + write, and nothing else: a shard in memory, all cores in each operation."""
    import torch
    from bitsandbytes import functional
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(cpu_slots())
    deltas = load_file(adapter / "adapter_model.safetensors")
    for path in sorted(base.glob("*.safetensors")):
        merged = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                if f"{stem}.lora_A.weight" in deltas:
                    packed, state = functional.quantize_4bit(
                        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
                    )
                    a, b = deltas[f"{stem}.lora_A.weight"], deltas[f"{stem}.lora_B.weight"]
                    weight = (functional.dequantize_4bit(packed, state).float() + 2.0 * (b @ a)).bfloat16()
                merged[name] = weight
        save_file(merged, out / path.name, metadata={"format": "pt"})


def peft(base: Path, adapter: Path, out: Path) -> None:
    """What everybody does: load in 4 bit, dequantize, merge_and_unload, save."""
    import torch
    from peft import PeftModel

    from tasks.jobs.loading.load import load_nf4

    torch.set_num_threads(cpu_slots())
    model = load_nf4(base, device="cpu").dequantize()
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out, max_shard_size="5GB")


def stream(base: Path, adapter: Path, out: Path) -> None:
    """Ours."""
    from dataclasses import replace

    from tasks.jobs import merge

    job = make_job("merge", out, params={"onto": "dequantized"}, base=base, adapter=adapter)
    merge.run(replace(job, execution=replace(job.execution, threads=cpu_slots())))


def imports(base: Path, adapter: Path, out: Path) -> None:
    """What ours imports, and nothing else."""
    from tasks.jobs import merge

    assert merge


def cp(base: Path, adapter: Path, out: Path) -> None:
    """The same bytes read and written, for scale."""
    for path in base.glob("*.safetensors"):
        subprocess.run(["cp", str(path), str(out)], check=True)


ARMS = {"cp": cp, "imports": imports, "stream": stream, "bare": bare, "peft": peft}


def timed(arm: str, base: Path, adapter: Path, out: Path) -> Timed:
    """Run an arm in a process of its own; its output is deleted."""
    out.mkdir()
    clock = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.merge", arm, str(base), str(adapter), str(out)],
        env={**child_env(threads=cpu_slots()), "PATH": os.environ["PATH"]},
        cwd=CHECKOUT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds = time.monotonic() - clock
    shutil.rmtree(out)
    return Timed(seconds=seconds, **json.loads(done.stdout.splitlines()[-1]))


def measure(size: Size, folder: Path) -> dict[str, list[Timed]]:
    """All arms of one size, taking turns."""
    from tests.jobs.synthetic import write_synthetic, write_synthetic_adapter  # torch: no arm pays for it unasked

    base = write_synthetic(
        folder / "base",
        hidden=size.hidden,
        intermediate=size.intermediate,
        layers=size.layers,
        vocabulary=size.vocabulary,
    )
    adapter = write_synthetic_adapter(folder / "adapter", base)
    os.sync()
    runs: dict[str, list[Timed]] = {arm: [] for arm in size.arms}
    for _ in range(size.repeats):
        for arm in size.arms:
            runs[arm].append(timed(arm, base, adapter, folder / "out"))
            print(size.name, arm, runs[arm][-1], flush=True)
    return runs


def table(size: Size, runs: dict[str, list[Timed]]) -> str:
    """A row an arm: medians, spread, peak; and as shares of the bare loop's and PEFT's."""
    lines = [
        f"## {size.name}: {size.bytes / 1e9:.1f} GB, median of {size.repeats}",
        "",
        "| arm | seconds | least - most | CPU seconds | peak RSS, GiB | speed, of the bare loop | by CPU time "
        "| time, of PEFT | CPU time, of PEFT | memory, of PEFT |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def seconds(arm: str) -> float:
        return statistics.median(one.seconds for one in runs[arm])

    def cpu(arm: str) -> float:
        return statistics.median(one.cpu_seconds for one in runs[arm])

    def peak(arm: str) -> float:
        return max(one.peak_gib for one in runs[arm])

    for arm in size.arms:
        least, most = min(one.seconds for one in runs[arm]), max(one.seconds for one in runs[arm])
        against = [seconds("bare") / seconds(arm), cpu("bare") / cpu(arm)]
        if "peft" in runs:
            against += [seconds(arm) / seconds("peft"), cpu(arm) / cpu("peft"), peak(arm) / peak("peft")]
        cells = [arm, f"{seconds(arm):.1f}", f"{least:.1f} - {most:.1f}", f"{cpu(arm):.1f}", f"{peak(arm):.2f}"]
        cells += [f"{share:.2f}" for share in against] + [""] * (5 - len(against))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the disk has room for; the page is written after each size."""
    parts = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            free = shutil.disk_usage(folder).free
            if free < 2.5 * size.bytes:
                parts.append(f"## {size.name}\n\nNot measured: {free / GIB:.0f} GiB were free.")
            else:
                parts.append(table(size, measure(size, Path(folder))))
        write_page(parts)


def write_page(parts: list[str]) -> None:
    """What is measured so far, and what is not."""
    parts = [*parts, *(f"## {size.name}\n\nNot measured yet with this code." for size in SIZES[len(parts) :])]
    machine = hardware()
    versions = ", ".join(
        f"{name} {locked_versions()[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
    )
    page = f"""<!-- Written by `make bench`. -->
# Merge, measured

Synthetic Llamas, LoRA of rank 16 on every linear layer, onto the dequantized NF4 base, on the CPU; every run is a
process of its own, imports included; the arms alternate. `bare` reads, quantizes, dequantizes, adds and writes, shard
by shard; `peft` loads in 4 bit, dequantizes, merges and saves; `cp` copies the same bytes.
Goals: 3 times the speed of the bare loop; <= 0.25 of PEFT's time; <= 0.3 of its memory; the peak of 7 B at most
0.15 GiB above that of 1 B.

`bare` and `peft` quantize by bitsandbytes' call and spend most of their time there. `stream` makes the same codes by
comparisons (`tasks/jobs/merging/nf4_blocks.py`). `imports` is what `stream` spends before it begins: torch,
transformers and bitsandbytes; in a run a warm parent has imported them. Where other work ran on the machine, the CPU
seconds are what to compare.

{"".join(part + chr(10) * 2 for part in parts)}{machine["cpu"]},
{machine["cores"]} cores, {machine["memory_gib"]} GiB; {versions}.
"""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(page, encoding="utf-8")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        arm, *paths = sys.argv[1:]
        ARMS[arm](*(Path(one) for one in paths))
        own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        used = sum(one.ru_utime + one.ru_stime for one in (own, children))
        peak = children.ru_maxrss if arm == "cp" else peak_kib()
        print(json.dumps({"cpu_seconds": used, "peak_gib": peak / (1 << 20)}))
    else:
        main()
