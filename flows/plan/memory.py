"""Predicts peak memory and output of every step from the recipe and the base's headers: arithmetic, no torch.

Constants with a figure were measured on CPU (torch 2.13.0, transformers 5.23.0) on two models: 6 M parameters with a
vocabulary of 4,096, and 110 M with 32,000; those of CUDA's libraries on an H200 (docs/gpu.md). Every row counts
as long as the longest, so what is predicted is seldom reached; the report shows predicted against measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flows.compose import machine
from flows.plan.mixtures import met_features, met_stacked_features
from flows.plan.quantizers import RECORD, Quantizer
from flows.plan.quantizers import needs as quantizer_needs
from flows.plan.row_sizes import RowSizes
from flows.plan.sizes import GIB, Sizes
from recipes.arms import Arm, arms, controls
from recipes.models.headers import Headers
from recipes.nulls import other_batch, score_gib
from recipes.plain import is_mapping
from recipes.schema import Recipe
from recipes.schemes.rank_bytes import rank_bytes
from recipes.schemes.ranks import ServedModel
from recipes.schemes.scheme import Scheme
from tasks.serve import unserved

# Resident GiB of a child on CPU before it has a model.
PREPARE = 0.55  # transformers' tokenizer
CALIBRATE = 0.28  # pyarrow, no torch
TRAIN = 0.85  # 0.53 after import of TRL, PEFT, bitsandbytes; the rest grows over the steps: batches differ in shape
MERGE = 0.46
LOAD = {
    "bf16": 0.55,
    "nf4": 0.60,
    "quantized": 0.66,
    "external": 0.66,
}  # reference, evaluate, measure, by the arm's kind
SERVER = 3.0  # 2.44 of vLLM 0.32.0 on a CPU, with 0.5 M parameters and 1 GiB of KV cache; 0.55 of the job that asks it
CUDA_HOST = 1.75  # with the CUDA libraries; 1.0 to 1.7 measured
CUDA_IMPORT = 0.35  # on top in a step that uses no GPU on a machine with one: torch loads its libraries all the same
CUDA_CONTEXT = 0.6  # GPU memory that no allocator counts
ADAM_BYTES = {"cpu": 4 + 4 + 8, "cuda": 4 + 4 + 2}  # per LoRA parameter: fp32, gradient, two moments (8-bit on CUDA)
# Per logit at the peak of the backward pass. CPU: bf16, and fp32 seven times, with log-softmax and gradient. CUDA: one
# kernel writes the gradient over the bf16 logit; the rest is reserve.
TRAIN_LOGIT_BYTES = {"cpu": 32, "cuda": 8}
TILE = (4096, 32768)  # tokens and vocabulary that TRL's output layer works on at once
ACTIVATION_FACTOR = 1.6  # kept for the backward pass, over the bf16 inputs and outputs of the linear layers
EAGER_BYTES = 2 + 4 + 2  # per score: bf16, softmax in fp32, bf16 again; by arithmetic, not measured
ROW_BYTES = 700  # of a row that waits on disk, in prepare and calibrate: docs/results/rows.md
ARROW_FACTOR = 3  # bytes of Arrow columns, read and filtered, per byte of JSONL
SCRATCH_FACTOR = 8  # bytes on disk while prepare works, per byte of JSONL: rows, their 5-grams, records, rows.parquet
ON_HOST = " (host)"  # ends the name of a part that lies on the host while the step works on a GPU
CONFIRMED = ("train", "evaluate")  # stages whose GPU memory was measured, on an H200: docs/gpu.md
# Parts that are counted as resident, and without which no step fails: files in memory, which are given back when memory
# is short, and the original beside a model that was quantized on a GPU, whose errors are then not measured.
FILES = ("file of weights", "file of logits", f"{RECORD}{ON_HOST}")


@dataclass(frozen=True, kw_only=True)
class StepNeeds:
    """Peak memory and output of one step.

    Attributes:
        key: `stage/slug`, as in the plan.
        host_gib: Resident memory of its process.
        gpu_gib: GPU memory; 0 on CPU.
        disk_gib: What it leaves in the store, and checkpoints while it runs.
        parts: What the peak is made of, GiB by name.
        confirmed: The formula was held against a measured peak; on a GPU not every stage's was.
    """

    key: str
    host_gib: float
    gpu_gib: float
    disk_gib: float
    parts: Mapping[str, float]
    confirmed: bool = True

    @property
    def needed_gib(self) -> float:
        """Host memory without which it cannot run: what is resident, less files that the system can drop."""
        return self.host_gib - sum(self.parts.get(name, 0.0) for name in FILES)

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.key.split("/")[0]


def predict(
    recipe: Recipe,
    headers: Headers,
    *,
    device: str = "cpu",
    rows: RowSizes | None = None,
    externals: Mapping[str, Headers] | None = None,
) -> list[StepNeeds]:
    """Peak memory and output of every step, in the order of the pipeline.

    Args:
        recipe: The recipe.
        headers: Of the base.
        device: `cpu` or `cuda`.
        rows: Sizes of the data's rows; None counts every row as data.max_length tokens.
        externals: Headers of the external models by name; one that is not there is left out.
    """
    others = externals or {}
    sizes = Sizes(recipe=recipe, headers=headers, device=device, rows=rows)
    steps = [_prepare(sizes), _rehearse(sizes), _train(sizes)]
    steps += [_merge(sizes, onto) for onto in ("dequantized", "original")]
    steps += [_reference(sizes, others.get(recipe.evaluate.reference or "")), _calibrate(sizes)]
    matrix = arms(recipe, machine=machine(recipe, device))
    every = [arm for arm in matrix if arm.unavailable is None and (not arm.external or arm.slug in others)]
    sizes_of = {arm: replace(sizes, headers=others[arm.slug]) if arm.external else sizes for arm in every}
    steps += [_control(sizes, kind) for kind in controls(every)]
    steps += [_quantize(sizes, arm, arm.scheme) for arm in every if arm.scheme and arm.of is None]
    steps += [_evaluate(sizes_of[arm], arm) for arm in every]
    steps += [_measure(sizes_of[arm], arm) for arm in every if arm.of is None and recipe.measure.enabled]
    if recipe.serve.engine != "none":
        model = ServedModel.of(headers)
        steps += [_serve(sizes, arm) for arm in every if not unserved(recipe, arm, model=model, device=device)]
    return steps


def _step(
    sizes: Sizes,
    key: str,
    parts: Mapping[str, float],
    *,
    process: float,
    disk: float = 0.0,
    on_gpu: bool = True,
    on_host: Mapping[str, float] | None = None,
) -> StepNeeds:
    """Bytes by part -> StepNeeds.

    With `on_gpu` on CUDA the parts lie on the GPU, and the host holds the libraries, the file of weights and what is
    named in `on_host`, which counts there and only there.
    """
    in_gib = {name: value / GIB for name, value in parts.items() if value}
    gpu = on_gpu and not sizes.on_cpu
    if not sizes.on_cpu and process != CALIBRATE:
        process += CUDA_IMPORT
    file = {"file of weights": sizes.bf16 / GIB} if gpu else {}
    host = {f"{name}{ON_HOST}": value / GIB for name, value in (on_host or {}).items() if value} if gpu else {}
    return StepNeeds(
        key=key,
        host_gib=CUDA_HOST + sum(file.values()) + sum(host.values()) if gpu else process + sum(in_gib.values()),
        gpu_gib=sum(in_gib.values()) if gpu else 0.0,
        disk_gib=disk / GIB,
        parts={"process": CUDA_CONTEXT if gpu else process, **in_gib, **host, **file},
        confirmed=not gpu or key.split("/")[0] in CONFIRMED,
    )


def _rehearse(sizes: Sizes) -> StepNeeds:
    """Scorers and the rows of dev and test, no model; 0.48 GiB measured on the quickstart's."""
    parts = {"rows": ARROW_FACTOR * sizes.data_bytes}
    return _step(sizes, f"rehearse/{sizes.recipe.name}", parts, process=PREPARE, on_gpu=False)


def _prepare(sizes: Sizes) -> StepNeeds:
    parts, disk = {"rows": ROW_BYTES * sizes.row_count}, SCRATCH_FACTOR * sizes.data_bytes
    return _step(sizes, f"prepare/{sizes.recipe.name}", parts, process=PREPARE, disk=disk, on_gpu=False)


def _calibrate(sizes: Sizes) -> StepNeeds:
    parts = {"rows": ARROW_FACTOR * sizes.data_bytes + ROW_BYTES * sizes.row_count}
    disk = sizes.data_bytes
    return _step(sizes, f"calibrate/{sizes.recipe.name}", parts, process=CALIBRATE, disk=disk, on_gpu=False)


def _control(sizes: Sizes, kind: str) -> StepNeeds:
    return _step(sizes, f"calibrate/{sizes.recipe.name}-{kind}", {}, process=PREPARE, on_gpu=False)


def _train(sizes: Sizes) -> StepNeeds:
    train, headers = sizes.recipe.train, sizes.headers
    if train.adapter is not None:  # copied; its rank is not known here and counts as the default
        return _step(
            sizes, f"train/{sizes.recipe.name}", {}, process=CALIBRATE, disk=4 * sizes.lora_parameters, on_gpu=False
        )
    tokens = sizes.recipe.micro_batch * sizes.length
    stacked = met_stacked_features(headers)
    kept = ACTIVATION_FACTOR * 2 * (met_features(headers, headers.linears) + stacked)
    if train.gradient_checkpointing:
        layer = met_features(headers, headers.decoder_layer) + stacked / max(1, headers.layers)
        kept = 2 * headers.hidden * headers.layers + ACTIVATION_FACTOR * 2 * layer
    trained = sizes.lora_parameters + sizes.saved_parameters
    run = sizes.recipe.run
    shares = run.processes if run.launcher == "fsdp-qlora" else 1
    parts = {
        "weights nf4": sizes.nf4 / shares,
        "gathered": sizes.gathered * (1 - 1 / shares),
        "lora and optimizer": ADAM_BYTES[sizes.device] * trained / shares,
        "activations": kept * tokens,
        "attention": _attention(sizes),
        "logits": TRAIN_LOGIT_BYTES[sizes.device] * min(tokens, TILE[0]) * min(headers.vocabulary, TILE[1]),
        **sizes.file,
    }
    if shares > 1:
        parts["base before it is cut up"] = max(0.0, _uncut(sizes, trained) - sum(parts.values()))
    # The adapter, and two checkpoints while it runs: fp32 adapter and two moments each, and the best weights.
    disk = (1 + 2 * 3 + 3 * (train.keep == "best")) * 4 * trained
    step = _step(sizes, f"train/{sizes.recipe.name}", parts, process=TRAIN, disk=disk)
    file = step.parts.get("file of weights", 0.0)  # is in memory once
    host_gib = file + (step.host_gib - file) * run.processes
    return replace(step, host_gib=host_gib, confirmed=step.confirmed and shares == 1)


def _uncut(sizes: Sizes, trained: int) -> float:
    """What each FSDP rank holds before the first step: transformers 5.23 loads a 4-bit base whole on every rank.

    Beside it the fp32 adapter, and the largest linear layer in bf16 while it is quantized.
    """
    largest = max((layer.weights for layer in sizes.headers.dense_linears), default=0)
    return sizes.nf4 + 4 * trained + 2 * largest


def _attention(sizes: Sizes) -> float:
    """What the attention kernel keeps beside its inputs: the mask of packed rows, and with eager all scores."""
    train, headers = sizes.recipe.train, sizes.headers
    rows, length = sizes.recipe.micro_batch, sizes.length
    scores = (rows * length) ** 2 if train.packing else rows * length**2
    if train.attention == "eager":
        layers = 1 if train.gradient_checkpointing else headers.layers
        return EAGER_BYTES * layers * headers.heads * scores
    return scores if train.packing and train.attention == "sdpa" else 0.0


def _merge(sizes: Sizes, onto: str) -> StepNeeds:
    """A stream: two linear layers at a time, whatever the model's size; what PEFT merges instead is not predicted."""
    largest = max(layer.weights for layer in sizes.headers.linears)
    parts = {"layers in work": 2 * (2 + 4) * largest}
    return _step(sizes, f"merge/{sizes.recipe.name}-{onto}", parts, process=MERGE, disk=sizes.bf16, on_gpu=False)


def _reference_bytes(sizes: Sizes) -> float:
    """bf16 logits over the completions of dev and test; the draw may give them a quarter more than their share."""
    limit = sizes.recipe.evaluate.reference_gib * GIB
    if sizes.rows is None:
        return limit
    share = 1.25 * (sizes.recipe.data.dev + sizes.recipe.data.test)
    tokens = share * sizes.rows.rows * sizes.rows.completion_tokens
    return min(limit, 2 * tokens * sizes.headers.vocabulary)


def _reference(sizes: Sizes, external: Headers | None) -> StepNeeds:
    batch = sizes.recipe.evaluate.batch_size
    weights = {"weights": _stored(external)} if external else {"weights nf4": sizes.nf4, **sizes.file}
    model = replace(sizes, headers=external) if external else sizes
    parts = {**weights, **model.forward(batch=batch, tokens=sizes.length)}
    disk = _reference_bytes(sizes)
    return _step(sizes, f"reference/{sizes.recipe.name}", parts, process=LOAD["nf4"], disk=disk)


def _quantize(sizes: Sizes, arm: Arm, scheme: Scheme) -> StepNeeds:
    calibrate = sizes.recipe.calibrate
    row_tokens = min(calibrate.seq_len, sizes.length)
    quantizer = Quantizer(
        headers=sizes.headers,
        scheme=scheme,
        tokens=calibrate.rows * row_tokens,
        row_tokens=row_tokens,
        on_cpu=sizes.on_cpu,
    )
    needs = quantizer_needs(quantizer, searched=arm.scales_from_base)
    return _step(
        sizes,
        f"quantize/{arm.slug}",
        needs.parts,
        process=needs.process,
        disk=quantizer.quantized,
        on_gpu=scheme.backend != "quench-rtn",  # tasks/quantize.py gives it no GPU
        on_host=needs.on_host,
    )


def _stored(headers: Headers) -> float:
    """Bytes of an external model once loaded; 4-bit codes of compressed-tensors become bf16."""
    quantized = headers.config.get("quantization_config")
    unpacked = is_mapping(quantized) and quantized.get("quant_method") == "compressed-tensors"
    return headers.weight_bytes * (4 if unpacked else 1)


def _process(arm: Arm) -> float:
    """What unpacks compressed-tensors is small: 0.01 GiB more than for bf16; GPTQModel's kernels are not."""
    unpacked = arm.scheme is not None and arm.scheme.form == "compressed-tensors"
    return LOAD["bf16" if unpacked else arm.kind]


def _weights(sizes: Sizes, arm: Arm) -> dict[str, float]:
    """An arm's weights as they are resident, and its adapter."""
    if arm.external:
        return {"weights": _stored(sizes.headers)}
    parts = {"adapter": 4.0 * sizes.lora_parameters} if arm.adapter else {}
    if arm.kind == "nf4":
        return {"weights nf4": sizes.nf4, **parts, **sizes.file}
    if arm.scheme is None:
        return {"weights bf16": sizes.bf16, **parts}
    if arm.scheme.form == "compressed-tensors":  # unpacked at load, layer by layer
        return {**parts, "weights bf16": sizes.bf16, **sizes.file}
    parts |= {"weights quantized": sizes.quantized(arm.scheme)}
    if sizes.on_cpu and arm.scheme.bits == 4 and arm.scheme.form == "gptq":
        # PyTorch's int4 kernel wants its own packing: 3 bytes per weight on the way, on small models.
        parts |= {"repacking": min(3.0 * sizes.headers.linear_parameters, GIB / 2)}
    return parts


def _evaluate(sizes: Sizes, arm: Arm) -> StepNeeds:
    evaluate, headers = sizes.recipe.evaluate, sizes.headers
    length = sizes.recipe.data.max_length if sizes.recipe.data.general else sizes.length
    batch = other_batch(evaluate.batch_size) if arm.null == "batch" else evaluate.batch_size
    parts = _weights(sizes, arm) | sizes.forward(batch=batch, tokens=length)
    parts["kv cache"] = sizes.kv_cache(batch=batch, tokens=sizes.length + evaluate.max_new_tokens)
    if arm.null == "attention":
        parts["attention"] = GIB * score_gib(batch, length, heads=headers.heads)
    if sizes.on_cpu:
        parts["file of logits"] = _reference_bytes(sizes)
        if arm.scheme and arm.scheme.bits in (2, 3) and arm.scheme.form == "gptq":
            parts["dequantized layers"] = 2 * headers.linear_parameters  # kept, so that it is done once
    return _step(sizes, f"evaluate/{arm.slug}", parts, process=_process(arm), disk=sizes.data_bytes)


def _measure(sizes: Sizes, arm: Arm) -> StepNeeds:
    measure = sizes.recipe.measure
    tokens = measure.prompt_tokens + measure.new_tokens
    parts = _weights(sizes, arm) | sizes.forward(batch=measure.batch, tokens=tokens, last_only=True)
    if arm.kind == "nf4" and sizes.on_cpu:
        parts["earlier loads"] = 2 * sizes.bf16  # it is loaded six times
    return _step(sizes, f"measure/{arm.slug}", parts, process=_process(arm))


def _serve(sizes: Sizes, arm: Arm) -> StepNeeds:
    """The engine's server, and the job that asks it. On a GPU vLLM takes nine tenths of the card, whatever it needs."""
    serve = sizes.recipe.serve
    length = serve.max_model_len or sizes.headers.max_positions or sizes.length
    whole, ranks = sizes.quantized(arm.scheme) if arm.scheme else sizes.bf16, serve.tensor_parallel
    weights = rank_bytes(whole, arm.scheme, sizes.headers, ranks=ranks)
    few = min(ServedModel.of(sizes.headers).key_value_heads, default=ranks)  # of more cards each keeps one head
    parts = {"weights": weights, "kv cache": sizes.kv_cache(batch=1, tokens=length) / min(ranks, few)}
    return _step(sizes, f"serve/{arm.slug}", parts, process=SERVER)
