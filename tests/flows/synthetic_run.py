"""A run's folder and store as the flow and the jobs leave them, with scores that were drawn instead of measured.

Twelve arms, rows of about 25 tokens, groups of one to three rows; figures follow the trial of the real chain.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recipes.arms import NOT_DECODED
from recipes.schemes.slugs import parse_scheme

BASE = Path(__file__).parents[2] / "recipes" / "quickstart" / "base"
DOMAINS = ("filter", "aggregate", "join", "grouping", "ordering", "sub-query", "distinct")
TOKENIZER = {"tokenizer.json": 264_546, "tokenizer_config.json": 202, "chat_template.jinja": 381}


@dataclass(frozen=True)
class Shape:
    """What an arm's scores look like: mean KL, excess loss, share of right answers, bytes of its weights."""

    kind: str
    kl: float
    loss: float
    task: float
    weights: int | None
    merge_base: str | None = None
    scheme: str | None = None
    on_base: bool = False
    calibration: str = "domain"
    scales_from_base: bool = False
    kv: str | None = None
    unavailable: str | None = None
    null: str | None = None


SHAPES: dict[str, Shape] = {
    "base": Shape("bf16", 6.8, 6.5, 0.002, None),
    "nf4-adapter": Shape("nf4", 0.0, 0.0, 0.907, None),
    "merged-dequantized": Shape("bf16", 3e-5, 1e-5, 0.907, 11_547_040, "dequantized"),
    "merged-original": Shape("bf16", 1e-3, 1e-3, 0.893, 11_547_040, "original"),
    "awq-w4-g128": Shape("quantized", 1.45e-3, 2e-3, 0.900, 4_716_000, "dequantized", "awq-w4-g128"),
    "gptq-w4-g128": Shape("quantized", 5.4e-4, 7e-4, 0.895, 4_716_000, "dequantized", "gptq-w4-g128"),
    "gptq-w4-g32": Shape("quantized", 3.1e-4, 4e-4, 0.903, 4_951_000, "dequantized", "gptq-w4-g32"),
    "gptq-w3-g128": Shape("quantized", 3.5e-3, 5e-3, 0.890, 4_126_000, "dequantized", "gptq-w3-g128"),
    "rtn-w4-g128": Shape("quantized", 2.35e-3, 3e-3, 0.880, 4_716_000, "dequantized", "rtn-w4-g128"),
    "rtn-w3-g128": Shape("quantized", 2.7e-2, 3.5e-2, 0.790, 4_126_000, "dequantized", "rtn-w3-g128"),
    "awq-w4-g128.on-base": Shape("quantized", 2.7e-3, 3e-3, 0.875, 4_716_000, None, "awq-w4-g128", True),
    "gptq-w4-g128.on-base": Shape("quantized", 2.35e-3, 3e-3, 0.887, 4_716_000, None, "gptq-w4-g128", True),
}


@dataclass(frozen=True)
class Serving:
    """What an engine makes of an arm: noise of a row and bias in nats a token, share of other answers, its speed."""

    noise: float = 0.002
    bias: float = 0.0
    changed: float = 0.01
    speed: float = 1.0
    lost: int = 0


@dataclass
class SyntheticRun:
    """Writes one run below `home`; change `broken`, `shapes` or the rows before `write`.

    Attributes:
        broken: Step key -> problem of a step that failed; what needs it is skipped.
        refused: Arm -> why the engine does not read it.
        serving: Arm -> what the engine makes of it; the others have no serve step.
        unserved: Arm -> why it has no serve step.
        devices: Arm -> kind of device that it was scored on; the others were on a CPU.
        drop_rows: Arms that are scored on one test row less.
        nan_rows: Arms with NaN in one loss.
        cut: Arm -> how many of its first answers have no end; the others' all have one.
        undecoded: Arms whose answers to dev were not decoded.
        prompts: Rows have prompts; plain texts have none, so no task score.
        run_id: Of the run's folder.
        salt: Another one puts the artifacts elsewhere in the store, so that two runs share a home.
        remade: Another one gives all artifacts other digests.
        part: Which of the `test` rows are there: two parts that overlap make runs that share some rows.
    """

    home: Path
    shapes: dict[str, Shape] = field(default_factory=lambda: dict(SHAPES))
    test: int = 400
    general: int = 120
    seed: int = 0
    measured: bool = True
    prompts: bool = True
    run_id: str = "20261124-120000-quickstart-ab12"
    salt: str = ""
    remade: str = ""
    part: slice = field(default_factory=lambda: slice(None))
    broken: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    serving: dict[str, Serving] = field(default_factory=dict)
    unserved: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    drop_rows: frozenset[str] = frozenset()
    nan_rows: frozenset[str] = frozenset()
    cut: dict[str, int] = field(default_factory=dict)
    undecoded: frozenset[str] = frozenset()
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        every, own = self.test, self.part
        self.rows = [hashlib.sha256(f"row {i}".encode()).hexdigest()[:16] for i in range(every)][own]
        self.groups = np.repeat(np.arange(every), rng.integers(1, 4, every))[:every][own]
        self.domains = [DOMAINS[group % len(DOMAINS)] for group in self.groups]
        self.tokens = rng.integers(12, 40, every)[own]
        self.luck = rng.random(every)[own]  # how hard a row is, the same for every arm
        self.hardness = rng.lognormal(0, 1.2, every)[own]
        self.loss = rng.gamma(0.5, 0.17, every)[own]
        self.test = len(self.rows)

    def write(self) -> Path:
        """Write store and run; returns the run's folder."""
        self.steps = []
        folder = self.home / "runs" / self.run_id
        folder.mkdir(parents=True)
        self._common()
        arms = [self._arm(slug, shape, index) for index, (slug, shape) in enumerate(self.shapes.items())]
        record = {
            "schema": 1,
            "id": folder.name,
            "name": "quickstart",
            "status": "completed",
            "started_at": "2026-11-24T12:00:00+00:00",
            "finished_at": "2026-11-24T12:09:31+00:00",
            "seconds": 571.2,
            "hardware": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_gib": 23.5, "gpus": []},
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "gptqmodel": "7.6.0"},
            "base": {"path": str(BASE), "digest": "5e1f" * 16, "source": "base"},
            "data": {"path": "data/domain.jsonl", "digest": "77aa" * 16, "source": "domain.jsonl"},
            "steps": self.steps,
            "arms": arms,
        }
        dump(folder / "steps.json", record)
        dump(
            folder / "recipe.resolved.json",
            {
                "name": "quickstart",
                "model": {"base": "base"},
                "data": {"path": "domain.jsonl", "general": "general.jsonl" if self.general else None},
                "evaluate": {"scorers": [{"kind": "sql-execution", "name": None}]},
                "measure": {"enabled": self.measured, "batch": 1, "prompt_tokens": 128, "new_tokens": 32},
            },
        )
        predicted = {step["key"]: {"host_gib": 0.9, "gpu_gib": None} for step in self.steps}
        dump(folder / "preflight.json", {"steps": predicted})
        return folder

    def _common(self) -> None:
        adapter = {"adapter_model.safetensors": 3_744_000, "adapter_config.json": 900}
        adapter |= {f"tokenizer/{name}": size for name, size in TOKENIZER.items()}
        self._step("prepare/quickstart", {"rows.parquet": 400_000}, seconds=6.1, notes=[("format", "messages")])
        self._step("train/quickstart", adapter, seconds=151.0, notes=[("seed", "0, batch 32 = 32 x 1")])
        for onto in ("dequantized", "original"):
            self._step(f"merge/{onto}", model_files(11_547_040), seconds=9.4)
        self._step("reference/quickstart", {"reference.safetensors": 81_920_000}, seconds=12.0)
        self._step("calibrate/quickstart", {"calibset.parquet": 61_000}, seconds=2.2)

    def _arm(self, slug: str, shape: Shape, index: int) -> dict[str, Any]:
        model, of = None, _of(slug, shape)
        if shape.unavailable:
            return self._record(slug, shape, model=None, evaluate=None, measure=None)
        serve = f"serve/{slug}" if slug in self.serving else None
        if of is not None:
            model = f"quantize/{of}" if shape.scheme else f"merge/{shape.merge_base}" if shape.merge_base else None
        elif shape.scheme:
            model = f"quantize/{slug}"
            note = [("kernel", "TorchLinear: no AVX512 kernel for 3 bits")] if "w3" in slug else []
            if files := self._step(model, model_files(shape.weights or 0), seconds=20.0 + index, notes=note):
                dump(files / "quantize.json", blocks(shape, np.random.default_rng([self.seed, index, 2])))
        elif shape.merge_base:
            model = f"merge/{shape.merge_base}"
        evaluate, measure = f"evaluate/{slug}", f"measure/{slug}"
        result = {"computed": computed(shape.null) | {"device": self.devices.get(slug, "cpu")}}
        if slug in self.undecoded:
            result["absent"] = {f"{metric}/dev": NOT_DECODED for metric in ("task", "truncated")}
        if files := self._step(evaluate, {}, seconds=14.0 + index / 3, needs=model, result=result):
            self._scores(files, slug, shape, np.random.default_rng([self.seed, index]))
        if self.measured and of is None and (files := self._step(measure, {}, seconds=8.0, needs=model)):
            dump(files / "speed.json", speed(shape, np.random.default_rng([self.seed, index, 1])))
        if serve and (files := self._step(serve, {}, seconds=95.0, needs=model)):
            self._served(files, slug, np.random.default_rng([self.seed, index, 3]))
        measure = measure if self.measured and of is None else None
        return self._record(slug, shape, model=model, evaluate=evaluate, measure=measure, serve=serve)

    def _record(
        self,
        slug: str,
        shape: Shape,
        *,
        model: str | None,
        evaluate: str | None,
        measure: str | None,
        serve: str | None = None,
    ) -> dict[str, Any]:
        """An arm of steps.json."""
        on_top = shape.on_base or slug.startswith("nf4-adapter")
        return {
            "slug": slug,
            "kind": shape.kind,
            "merge_base": shape.merge_base,
            "scheme": shape.scheme,
            "quantization": parse_scheme(shape.scheme).params() if shape.scheme else None,
            "on_base": shape.on_base,
            "refused": self.refused.get(slug),
            "calibration": shape.calibration,
            "scales_from_base": shape.scales_from_base,
            "model": model,
            "kv": shape.kv,
            "null": shape.null,
            "of": _of(slug, shape),
            "external": False,
            "unavailable": shape.unavailable,
            "adapter": "train/quickstart" if on_top and not shape.unavailable else None,
            "evaluate": evaluate,
            "measure": measure,
            **({"serve": serve} if serve else {}),
            **({"unserved": self.unserved[slug]} if slug in self.unserved else {}),
        }

    def _step(
        self,
        key: str,
        files: dict[str, int],
        *,
        seconds: float,
        needs: str | None = None,
        notes: list[tuple[str, str]] | None = None,
        result: dict[str, Any] | None = None,
    ) -> Path | None:
        """Record a step; returns its files/ folder where it was made."""
        stage, slug = key.split("/")
        mark = hashlib.sha256(f"{self.salt}{key}".encode()).hexdigest()
        record = {"key": key, "stage": stage, "slug": slug, "fingerprint": mark, "log": None, "problem": None}
        self.steps.append(record)
        if problem := self.broken.get(key):
            record |= {"status": "failed", "path": None, "problem": problem, "log": f"partial/{key}/attempt-1/log.txt"}
            return None
        if needs in self.broken:
            why = {"what": "not run", "where": key, "why": f"{needs} was not made", "next": "mend that and run again"}
            record |= {"status": "skipped", "path": None, "problem": why}
            return None
        path = f"store/{stage}/{slug}-{mark[:12]}"
        record |= {"status": "made", "path": path, "seconds": seconds}
        folder = self.home / path / "files"
        folder.mkdir(parents=True)
        events = [{"t": 0, "kind": "note", "about": about, "text": text} for about, text in notes or []]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
        dump(
            folder.parent / "manifest.json",
            {
                "schema": 1,
                "stage": stage,
                "slug": slug,
                "fingerprint": mark,
                "digest": hashlib.sha256(f"{key} bytes{self.remade}".encode()).hexdigest(),
                "identity": {"stage": stage, "version": 1, "params": {}},
                "inputs": {},
                "files": {name: {"sha256": "0" * 64, "size": size} for name, size in files.items()}
                | {"events.jsonl": {"sha256": "0" * 64, "size": 99}, "quantize.json": {"sha256": "0" * 64, "size": 7}},
                "attempts": 1,
                "result": result or {},
                "seconds": seconds,
                "peak_rss_gib": 0.7 + seconds / 400,
                "peak_gpu_gib": None,
                "started_at": "2026-11-24T12:00:00+00:00",
                "finished_at": "2026-11-24T12:00:10+00:00",
                "hardware": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_gib": 23.5, "gpus": []},
                "execution": {"device": "cpu", "threads": 1, "micro_batch": None},
            },
        )
        return folder

    def _scores(self, files: Path, slug: str, shape: Shape, rng: np.random.Generator) -> None:
        table: dict[str, list[Any]] = {name: [] for name in ("row", "group", "split", "domain", "metric", "sum", "n")}

        def add(split: str, metric: str, sums: np.ndarray, counts: np.ndarray, rows: list[int]) -> None:
            names = self.rows if split != "general" else [f"g{index}" for index in range(self.general)]
            groups = self.groups if split != "general" else np.arange(self.general)
            table["row"] += [names[index] for index in rows]
            table["group"] += [f"{split}-group-{groups[index]}" for index in rows]
            table["split"] += [split] * len(rows)
            table["domain"] += [self.domains[index] if split != "general" else "" for index in rows]
            table["metric"] += [metric] * len(rows)
            table["sum"] += [float(sums[index]) for index in rows]
            table["n"] += [int(counts[index]) for index in rows]

        rows = list(range(self.test - (1 if slug in self.drop_rows else 0)))
        kl = shape.kl * np.repeat(self.hardness, self.tokens) * rng.lognormal(-0.9, 1.4, self.tokens.sum())
        start = np.concatenate([[0], np.cumsum(self.tokens)])
        kl_sum = np.add.reduceat(kl, start[:-1])
        harder = self.hardness if shape.loss < 1 else self.hardness**0.15
        nll = self.tokens * (
            self.loss + shape.loss * harder * rng.lognormal(-0.1, 0.5 if shape.loss < 1 else 0.1, self.test)
        )
        if slug in self.nan_rows:
            nll[3] = np.nan
        agree = rng.binomial(self.tokens, float(np.exp(-0.6 * shape.kl**0.5 * 0.3)))
        right = (self.luck < shape.task) ^ (rng.random(self.test) < min(0.02, shape.kl))
        right &= np.arange(self.test) >= self.cut.get(slug, 0)
        ones = np.ones(self.test)
        for split in ("dev", "test"):
            add(split, "nll", nll, self.tokens, rows)
            add(split, "nll_all", nll + 3.1 * self.tokens, 2 * self.tokens, rows)
            add(split, "bits", nll / np.log(2), 3 * self.tokens, rows)
            add(split, "kl", kl_sum, self.tokens, rows)
            add(split, "agree", agree if shape.kl else self.tokens, self.tokens, rows)
            if self.prompts and (split == "test" or slug not in self.undecoded):
                add(split, "task", right, ones, rows)
                add(split, "truncated", np.arange(self.test) < self.cut.get(slug, 0), ones, rows)
        if self.general:
            far = 2.55 + (0.6 + shape.loss / 40 if slug != "base" else 0.0)
            count = np.full(self.general, 200)
            add(
                "general", "nll_general", far * count + rng.normal(0, 9, self.general), count, list(range(self.general))
            )
        pq.write_table(pa.table(table), files / "scores.parquet")
        if self.prompts:
            pq.write_table(pa.Table.from_pylist(self._answers(slug, right, rows)), files / "answers.parquet")
        owner = np.repeat(self.groups, self.tokens)
        tokens = {
            "row": np.concatenate([np.repeat(self.rows, self.tokens)] * 2),
            "group": [f"{split}-group-{group}" for split in ("dev", "test") for group in owner],
            "split": ["dev"] * len(kl) + ["test"] * len(kl),
            "kl": np.concatenate([kl * 2, kl]).astype(np.float32),
        }
        pq.write_table(pa.table(tokens), files / "kl.parquet")

    def _served(self, files: Path, slug: str, rng: np.random.Generator) -> None:
        """scores.parquet and served.json of a serve step: the arm's own scores of test, and noise."""
        how = self.serving[slug]
        (own,) = self.home.glob(f"store/evaluate/{slug}-{'?' * 12}/files/scores.parquet")
        table = pq.read_table(own, filters=[("split", "==", "test")]).to_pydict()
        lines = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
        kept = {str(name) for name in self.rows[: len(self.rows) - how.lost]}
        served: list[dict[str, Any]] = []
        for line in (line for line in lines if line["row"] in kept):
            if line["metric"] == "nll":
                more = line["n"] * (how.bias + how.noise * float(rng.normal()))
                served.append({**line, "metric": "served_nll", "sum": line["sum"] + more})
            if line["metric"] == "task":
                equal = float(rng.random() >= how.changed)
                score = line["sum"] if equal else float(rng.random() < 0.5)
                served += [
                    {**line, "metric": "served_task", "sum": score},
                    {**line, "metric": "served_equal", "sum": equal},
                    {**line, "metric": "served_truncated", "sum": 0.0},
                ]
        pq.write_table(pa.Table.from_pylist(served), files / "scores.parquet")
        dump(files / "served.json", served_json(slug, how, rng))

    def _answers(self, slug: str, right: np.ndarray, rows: list[int]) -> list[dict[str, Any]]:
        """answers.parquet: dev and test rows, one table of patients."""
        return [
            {
                "row": self.rows[index],
                "split": split,
                "domain": self.domains[index],
                "prompt": f"<|im_start|>user\npatients(id, name, age)\nWho is over {20 + index % 60}?<|im_end|>\n",
                "reference": reference_of(index),
                "answer": answer_to(index, right=bool(right[index]), slug=slug),
                "score": float(right[index]) if slug != "base" else 0.0,
                "error": None if right[index] else "other rows than the reference answer's",
            }
            for split in ("dev", "test")
            for index in rows
            if split == "test" or slug not in self.undecoded
        ]


def _of(slug: str, shape: Shape) -> str | None:
    """The arm whose files are loaded, where it is another one."""
    return slug.rpartition(".")[0] if shape.kv or shape.null else None


def computed(null: str | None) -> dict[str, Any]:
    """What an evaluate job records of its computing; of a null arm one thing is other."""
    other = {"batch": {"batch_size": 8}, "threads": {"threads": 2}, "attention": {"attention": "eager"}}
    return {"attention": "sdpa", "threads": 1, "batch_size": 16, **other.get(null or "", {})}


def answer_to(index: int, *, right: bool, slug: str) -> str:
    """The answer of an arm: as the reference, one word off, or what an untuned base writes."""
    if slug == "base":
        return "The question asks for the names of all patients. To answer it,"
    return reference_of(index) if right else reference_of(index).replace("age >", "age >=")


def reference_of(index: int) -> str:
    """The answer that the data has."""
    return f"SELECT name FROM patients WHERE age > {20 + index % 60} ORDER BY name"


def blocks(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
    """quantize.json, but for the linear layers: 24 decoder layers, errors that follow the arm's KL."""
    seen = not (shape.scheme or "").startswith("rtn")
    found = []
    for layer in range(24):
        for part, more in (("self_attn", 0.8), ("mlp", 1.2)):
            error = float(more * shape.kl**0.5 * (1 + layer / 30) * rng.lognormal(0, 0.1))
            errors = {"output_error": error if seen else None, "weight_error": None if seen else error}
            std = 0.02 * (1.2 if part == "mlp" else 0.9 + layer / 60)
            found.append({"layer": layer, "part": part, "weight_std": std, **errors})
    return {"kernel": "TorchLinear" if seen else None, "error_tokens": 512 if seen else 0, "blocks": found}


def model_files(weights: int) -> dict[str, int]:
    """Files of a Hugging Face folder with so many bytes of weights."""
    return {"model.safetensors": weights, "config.json": 1_100, "generation_config.json": 98, **TOKENIZER}


def speed(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
    """speed.json of an arm."""
    slow = 0.3 if shape.kind == "quantized" else 1.0
    return {
        "load_s": [float(one) for one in rng.lognormal(-1.5, 0.1, 5)],
        "prefill_tokens_per_s": [float(one) for one in 9000 * slow * rng.lognormal(0, 0.05, 5)],
        "decode_tokens_per_s": [float(one) for one in 90 * slow * rng.lognormal(0, 0.05, 5)],
        "peak_rss_gib": 0.8,
        "resident_bytes": 12_000_000,
        "kernel": "TorchLinear" if shape.kind == "quantized" else "Linear",
        "serving_kernel": shape.kind == "bf16",
        "device": "cpu",
        "threads": 2,
        "batch": 1,
        "context": 128,
    }


def served_json(slug: str, how: Serving, rng: np.random.Generator) -> dict[str, Any]:
    """served.json of an arm: three loads, three repeats each."""

    def rates(at: float) -> list[float]:
        return [float(one) for one in at * how.speed * rng.lognormal(0, 0.03, 3)]

    return {
        "engine": "vllm",
        "version": "0.32.0",
        "device": "cpu",
        "command": ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", slug],
        "kernel": "CPUWNA16LinearKernel" if "-w" in slug else None,
        "start_s": 31.4,
        "resident_gib": 2.31,
        "kv_cache_dtype": "auto",
        "loads": [
            {
                "requests": requests,
                "prompt_tokens": 128,
                "new_tokens": 32,
                "prefill_tokens_per_s": rates(9_000 * requests**0.2),
                "output_tokens_per_s": rates(130 * requests**0.9),
                "ttft_s": [float(one) for one in 0.02 * requests * rng.lognormal(0, 0.3, 3 * requests)],
                "seconds": rates(1.2),
            }
            for requests in (1, 8, 32)
        ],
    }


def dump(path: Path, value: object) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
