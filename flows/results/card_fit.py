"""Which arm fits a card, or each of several: weights, KV cache and an allowance, by arithmetic from the arm's files.

What is counted: the bytes of the arm's files (a server keeps quantized weights packed, while plain transformers may
unpack them, so resident_bytes of a CPU says less here); keys and values of `batch` sequences of `context` tokens; what
a forward pass of a chunk of prompts holds; a CUDA context. A tenth of the card stays free (vLLM's default). Of several
cards (vLLM's tensor parallelism) each holds its share of the weights (recipes/schemes/rank_bytes.py) and of the
key-value heads, at least one; what NCCL takes is not counted. No GPU has confirmed these sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flows.plan.memory import CUDA_CONTEXT
from flows.plan.sizes import GIB
from flows.results.cells import Cell
from flows.results.read import Run, RunArm
from recipes.models.headers import Headers, read_headers
from recipes.models.kv_cache import WINDOWS, WITHOUT_CACHE, CacheLayer, layer_kinds
from recipes.problem import RecipeError
from recipes.schemes.engines import cautions, refusals
from recipes.schemes.rank_bytes import rank_bytes
from recipes.schemes.ranks import ServedModel
from recipes.schemes.reads import NAMES, Engine

Store = Literal["bf16", "fp8", "int8"]  # how keys and values are kept
BYTES: dict[Store, float] = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0}
SCALE_BYTES: dict[Store, float] = {"bf16": 0.0, "fp8": 0.0, "int8": 4.0}  # fp32, per token and head
FREE_SHARE = 0.1  # of the card: fragmentation, CUDA graphs; vLLM's --gpu-memory-utilization 0.9
CHUNK_TOKENS = 2048  # of prompts in one forward pass; longer ones come in several (chunked prefill)
LOGIT_BYTES = 8  # fp32 and a copy, for the last token of each sequence
EXAMPLES_GIB = (8.0, 16.0, 24.0, 80.0)
EXAMPLE_BATCH = 8
KEPT = ("full_attention", "sliding_attention", "chunked_attention")
OTHER_STATE = ("kv_lora_rank", "ssm_state_size", "mamba_d_state", "linear_num_value_heads")  # no plain keys and values


class Refused(Exception):
    """The config describes a cache that is not keys and values of every token."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The KV cache of a model: layers with a window keep no more than it, layers that share one have none."""

    layers: tuple[CacheLayer, ...]

    def per_token(self, kept: Store) -> float:
        """Bytes per token while no window is full."""
        return sum(_token_bytes(layer, kept) for layer in self.layers)

    def size(self, kept: Store, *, context: int, batch: int) -> float:
        """Bytes of `batch` sequences of `context` tokens."""
        tokens = ((layer, min(context, layer.window or context)) for layer in self.layers)
        return batch * sum(_token_bytes(layer, kept) * held for layer, held in tokens)


def _token_bytes(layer: CacheLayer, kept: Store) -> float:
    """Keys and values of one token, and an fp32 scale a head of each where they are int8."""
    return BYTES[kept] * (layer.keys + layer.values) + 2 * SCALE_BYTES[kept] * layer.heads


def cache_of(headers: Headers, *, ranks: int = 1) -> Cache:
    """Keys and values of every layer on one of `ranks` cards: 2 x its key-value heads x head size per token.

    Raises:
        Refused: Latent attention, state-space or linear layers, whose state is another one.
    """
    config = headers.text_config
    if other := [name for name in OTHER_STATE if config.get(name)]:
        raise Refused(f"config.json has {other[0]}: its cache is not keys and values of every token")
    unknown = sorted({kind for kind in layer_kinds(config, headers.layers) if kind not in (*KEPT, *WITHOUT_CACHE)})
    if unknown:
        raise Refused(f"config.json has layers of type {', '.join(unknown)}")
    layers = headers.cache_layers
    for kind in (kind for kind in WINDOWS if any(layer.kind == kind and layer.window is None for layer in layers)):
        raise Refused(f"config.json has layers of type {kind} and no {WINDOWS[kind]}")
    return Cache(layers=tuple(_on_rank(layer, ranks) for layer in layers))


def _on_rank(layer: CacheLayer, ranks: int) -> CacheLayer:
    """A card's key-value heads: its share, and one where there are fewer than cards."""
    held = -(-layer.heads // ranks)
    each = {"keys": layer.keys * held // layer.heads, "values": layer.values * held // layer.heads}
    return layer._replace(heads=held, **each)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One arm for one workload.

    Attributes:
        cache: How it keeps keys and values.
        weights: Bytes of its files; of several cards what each of them holds of these.
        needed: Bytes of weights, cache and allowance, on each card.
        refused: Why it is out, whatever the card: the engine, no figures, nothing to ship; None where it is in.
        slower: What the engine pads at every step; None where nothing, or no engine was asked.
    """

    arm: str
    cache: Store
    weights: float | None
    needed: float | None
    task: float | None
    kl_mean: float | None
    refused: str | None
    slower: str | None = None

    def fits(self, vram_gib: float) -> bool:
        """It runs on a card, or on cards, of so many GiB each."""
        return self.refused is None and self.needed is not None and self.needed <= (1 - FREE_SHARE) * vram_gib * GIB


class Workload(NamedTuple):
    """Sequences at once, tokens of each, prompt and answer, and cards that every layer is split over."""

    context: int
    batch: int
    tensor_parallel: int = 1


def fits(
    run: Run, figures: Mapping[str, Mapping[str, float | None]], work: Workload, headers: Headers, engine: str | None
) -> list[Fit]:
    """Every arm for a workload. The untouched base and controls are left out: nobody ships them.

    Args:
        run: The run.
        figures: Arm -> size_bytes, task and kl_mean.
        work: What is served.
        headers: Of the base.
        engine: Who serves; None for the recipe's, on as many cards as the recipe has.

    Raises:
        Refused: The cache cannot be computed from config.json.
    """
    ranks = work.tensor_parallel
    cache, allowance = cache_of(headers, ranks=ranks), allowance_bytes(headers, work)
    model, asked = ServedModel.of(headers), engine or engine_of(run)
    every: list[Fit] = []
    for arm in run.arms:
        if arm.is_control or arm.null or arm.unavailable or (arm.model is None and arm.adapter is None):
            continue
        own, kept = figures[arm.slug], kept_by(arm)
        refused, size = _refused(arm, own, model, engine, ranks), own["size_bytes"]
        if size is not None and refused is None:
            size = rank_bytes(size, arm.quantizer, headers, ranks=ranks)
        keys = cache.size(kept, context=work.context, batch=work.batch)
        every.append(
            Fit(
                arm=arm.slug,
                cache=kept,
                weights=size,
                needed=None if size is None else size + keys + allowance,
                task=own["task"],
                kl_mean=own["kl_mean"],
                refused=refused,
                slower=None if refused else _slower(arm, model, asked, ranks),
            )
        )
    return every


def kept_by(arm: RunArm) -> Store:
    """How an arm keeps its keys and values."""
    return "bf16" if arm.kv is None else "int8" if arm.kv == "int8" else "fp8"


def allowance_bytes(headers: Headers, work: Workload) -> float:
    """CUDA's context, activations of one chunk of prompts through the widest layer, logits of the last tokens."""
    model, ranks = ServedModel.of(headers), work.tensor_parallel
    widest = max(model.inputs(layer, ranks) + model.outputs(layer, ranks) for layer in headers.linears)
    tokens = min(work.context * work.batch, CHUNK_TOKENS)
    return CUDA_CONTEXT * GIB + 2 * 2 * widest * tokens + LOGIT_BYTES * headers.vocabulary * work.batch


def _refused(
    arm: RunArm, own: Mapping[str, float | None], model: ServedModel, engine: str | None, ranks: int
) -> str | None:
    served = replace(arm if engine is None else _on(arm, model, engine, ranks), kv=None)
    if served.unfit:
        return served.unfit
    missing = [name for name in ("size_bytes", "kl_mean") if own[name] is None]
    return f"it has no {missing[0]}" if missing else None


def _on(arm: RunArm, model: ServedModel, engine: str, ranks: int) -> RunArm:
    """The arm as another engine, or another number of cards, sees it."""
    if engine == "none" or (arm.quantizer is None and arm.kind != "bf16"):
        return replace(arm, refused=None)
    problems = refusals(arm.quantizer, model, engine=_engine(engine), tensor_parallel=ranks)
    return replace(arm, refused=problems[0].what if problems else None)


def _slower(arm: RunArm, model: ServedModel, engine: str, ranks: int) -> str | None:
    if engine == "none" or arm.quantizer is None:
        return None
    problems = cautions(arm.quantizer, model, engine=_engine(engine), tensor_parallel=ranks)
    return problems[0].what if problems else None


def _engine(name: str) -> Engine:
    return next(engine for engine in NAMES if engine == name)


def front(every: Sequence[Fit]) -> set[str]:
    """Arms that no other beats: fewer bytes and no more KL, or less KL and no more bytes."""
    able = [fit for fit in every if fit.refused is None]
    return {fit.arm for fit in able if not any(_beats(other, fit) for other in able)}


def _beats(a: Fit, b: Fit) -> bool:
    assert None not in (a.needed, a.kl_mean, b.needed, b.kl_mean)  # else they were refused
    pairs = ((a.needed, b.needed), (a.kl_mean, b.kl_mean))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)  # pyright: ignore[reportOperatorIssue]


def best(every: Sequence[Fit], vram_gib: float) -> Fit | None:
    """The lowest KL among those that fit, then the fewest bytes."""
    able = [fit for fit in every if fit.fits(vram_gib)]
    return min(able, key=lambda fit: (fit.kl_mean, fit.needed), default=None)


def engine_of(run: Run) -> str:
    """The engine that the recipe names; `none` where it names none."""
    return (run.recipe.get("serve") or {}).get("engine", "none")


def cards_of(run: Run, engine: str | None) -> int:
    """Cards that the recipe splits a model over, where vLLM serves; nobody else here is known to split one."""
    serve = run.recipe.get("serve") or {}
    return serve.get("tensor_parallel", 1) if (engine or serve.get("engine")) == "vllm" else 1


# ---- the report's section


def headers_of(run: Run) -> Headers | None:
    """Of the base, or of a merged model where the base has gone; None without either."""
    merged = (run.step(arm.model) for arm in run.arms if arm.kind == "bf16" and arm.model)
    folders: Iterator[Path] = (step.files for step in merged if step is not None and step.files is not None)
    for folder in (*([run.base] if run.base else []), *folders):
        try:
            return read_headers(folder)
        except RecipeError:
            continue
    return None


def figures_of(cells: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, float | None]]:
    """Arm -> the figures that rank it."""
    return {slug: {name: own[name].value for name in ("size_bytes", "task", "kl_mean")} for slug, own in cells.items()}


def fit_of(run: Run, cells: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
    """Key `fit` of report.json; `reason` where it cannot be computed."""
    empty: dict[str, Any] = {"kv_bytes_per_token": None, "arms": [], "examples": [], "reason": None}
    headers = headers_of(run)
    if headers is None:
        return {**empty, "reason": "neither the base nor a merged model is there any more"}
    context = (run.recipe.get("serve") or {}).get("max_model_len") or headers.max_positions or 4096
    work = Workload(context, EXAMPLE_BATCH, cards_of(run, None))
    try:
        every, cache = fits(run, figures_of(cells), work, headers, None), cache_of(headers)
    except Refused as error:
        return {**empty, "reason": str(error)}
    ahead = front(every)
    return {
        "kv_bytes_per_token": {kept: cache.per_token(kept) for kept in BYTES},
        "allowance_bytes": allowance_bytes(headers, work),
        "free_share": FREE_SHARE,
        "arms": [
            {
                "arm": fit.arm,
                "kv": fit.cache,
                "weights_bytes": fit.weights,
                "needed_bytes": fit.needed,
                "task": fit.task,
                "kl_mean": fit.kl_mean,
                "on_front": fit.arm in ahead,
                "refused": fit.refused,
            }
            for fit in every
        ],
        "examples": [
            {"vram_gib": size, **work._asdict(), "best": fit.arm if (fit := best(every, size)) else None}
            for size in EXAMPLES_GIB
        ],
        "reason": None,
    }
