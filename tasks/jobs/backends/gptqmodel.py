"""GPTQ and AWQ through GPTQModel 7.6, on CPU and CUDA; its silent habits become notes.

What it does without saying so: it drops rows of up to 10 tokens, cuts rows at max_position_embeddings, raises the
damping where a Hessian does not factor, rounds a layer to nearest where hardly any token reached it, and searches AWQ's
scales on the last batch alone where batches differ in length. It captures the inputs of the first decoder layer and
replays its position embeddings in all others, also where they differ by layer type (Gemma 3).

On CUDA one decoder layer at a time lies on the GPU. Everything else is asked for on the host or on the disk: by default
the layer's outputs for all rows would stay on the GPU (ForwardExecutor.run_single: `calibration_data_device` is None).
`flows/plan/quantizers.py` has what lies where, with the places in GPTQModel's source.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compressed_tensors.utils import patch_attr

from recipes.schemes.scheme import PER_CHANNEL
from tasks.jobs.backends import (
    LayerRecord,
    Quantized,
    Request,
    equal_lengths,
    linear_names,
    note_skipped,
    note_tokens,
    unpadded,
)
from tasks.jobs.backends.awq_inputs import inputs_kept_once
from tasks.jobs.backends.names import linear_layers, linear_modules
from tasks.jobs.loading.environment import tame_gptqmodel
from tasks.runtime.process.events import Events

OFFLOAD = "offload"  # of packed layers, in the working folder
# Warnings that say nothing about the result: the GIL, the disk, and "256 samples" that counts sequences, not rows.
HARMLESS = ("Python GIL", "Disk subsystem", "Calibration dataset size", "average length of input_ids")


def quantize(request: Request) -> Quantized:
    """Quantize and save.

    Raises:
        StageError: A linear layer of the checkpoint is not one in the loaded model.
    """
    params, device, rows = request.params, request.device, request.rows
    # Absolute paths, because the current folder changes below.
    model, out, events = request.model.resolve(), request.out.resolve(), Events(request.events.path.resolve())
    tame_gptqmodel()
    from gptqmodel import BACKEND, GPTQModel, __version__

    # On CUDA its own choice for packing may be Machete, which fetches CUTLASS from the net.
    backend = BACKEND.GPTQ_TORCH if device == "cuda" else BACKEND.AUTO
    if params["method"] == "awq":
        backend = BACKEND.AWQ_TORCH  # the only packer of AWQ's gemm layout that needs no CUDA
        rows = equal_lengths(rows, events=events)
        events.note("scales", "AWQ's scales are stored in bf16, the model's type; AutoAWQ stores fp16")
    names = linear_names(model)
    kept = inputs_kept_once() if params["method"] == "awq" else contextlib.nullcontext()
    with _scratch(out if device == "cuda" else None), _warnings(events), kept, _without_processor(model):
        loaded: Any = GPTQModel.load(str(model), _config(params, device=device), device=device, trust_remote_code=False)
        modules = linear_modules(loaded.model, names, backend="GPTQModel")
        prefix = loaded.extract_layers_node()[0]
        inside = {name for name in linear_layers(loaded.model) if name.startswith(f"{prefix}.")}
        total = loaded.model.config.get_text_config().num_hidden_layers

        def layer_done(*, layer_idx: int, submodule_finalized: bool) -> None:
            if not submodule_finalized:
                events.progress(layer_idx + 1, total, unit="layer")

        loaded.layer_callback = layer_done
        _note_rope(loaded.model.config.get_text_config(), events=events)
        # One row per batch: no padding can enter a statistic, and it costs nothing (9.9 s against 10.6 s).
        log = loaded.quantize(unpadded(rows), batch_size=1, backend=backend)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints both configs
            loaded.save(str(out))
    if device == "cuda":
        forget_where(out)
    of_module = {f"{prefix}.{entry['layer']}.{entry['module']}": entry for entry in log[params["method"]]}
    entries = {name: of_module[module] for name, module in modules.items() if module in of_module}
    name_what_is_left(out, left=inside - set(of_module), made=set(of_module), method=params["method"])
    # Its log has the order in which threads ended; ours has the checkpoint's, so that equal inputs give equal files.
    layers = [_record(name, entry) for name, entry in entries.items()]
    _note_habits(layers, entries, names, params=params, tokens=sum(map(len, rows)), events=events)
    packer = getattr(loaded.qlinear_kernel, "__name__", str(loaded.qlinear_kernel))
    return Quantized(backend=f"gptqmodel:{__version__}", packer=packer, layers=layers)


def _config(params: dict[str, Any], *, device: str) -> Any:
    """The scheme in GPTQModel's words, with what lies where; the files are the same either way.

    On a CPU the model stays in memory. On CUDA a decoder layer is read when its turn comes, its inputs and outputs lie
    on the host, and it is packed and on the disk before the next one comes.
    """
    from gptqmodel.quantization import AWQConfig, GPTQConfig

    apart = {"offload_to_disk_path": OFFLOAD, "calibration_data_device": "cpu", "wait_for_submodule_finalizers": True}
    common = {
        "bits": params["bits"],
        "group_size": params["group_size"],
        "sym": params["symmetric"],
        "offload_to_disk": device == "cuda",
        **(apart if device == "cuda" else {}),
    }
    if params["method"] == "awq":
        return AWQConfig(**common)
    return GPTQConfig(
        **common,
        desc_act=params["desc_act"],
        damp_percent=params["damp"],
        # Orders columns within the groups, so that the file stays in plain order; one group has nothing to order.
        act_group_aware=not params["desc_act"] and params["group_size"] != PER_CHANNEL,
    )


def name_what_is_left(out: Path, *, left: set[str], made: set[str], method: str) -> None:
    """Say in config.json which linear layers of the decoder are not quantized: transformers would expect codes of them.

    Args:
        out: The quantized model.
        left: Module names of linear layers that are not quantized.
        made: Of those that are.
        method: `gptq` or `awq`.
    """
    if not left:
        return
    suffixes = {name: re.sub(r"^.*?\.\d+\.", "", name) for name in (*left, *made)}
    kept, quantized = ({suffixes[name] for name in some} for some in (left, made))
    said = (
        {"modules_in_block_to_quantize": [sorted(quantized - kept)]}
        if method == "gptq"
        else {"modules_to_not_convert": sorted(kept)}
    )
    _edit_configs(out, lambda config: config.update(said))


def forget_where(out: Path) -> None:
    """What lay where is no property of a model: its configs say what they say of one that was made on a CPU."""
    places = {"offload_to_disk": False, "offload_to_disk_path": None, "wait_for_submodule_finalizers": False}
    _edit_configs(out, lambda config: config["meta"].update(places))


def _edit_configs(out: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the quantization config in both files that hold it."""
    for name in ("config.json", "quantize_config.json"):
        text = (out / name).read_text(encoding="utf-8")
        config = json.loads(text)
        edit(config.get("quantization_config", config))
        end = "\n" if text.endswith("\n") else ""
        (out / name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + end, encoding="utf-8")


@contextlib.contextmanager
def _without_processor(model: Path) -> Iterator[None]:
    """Leave the processor of images alone: it is copied, not used, and loading it may ask for torchvision."""
    from gptqmodel.models.auto import MODEL_MAP

    kind = MODEL_MAP.get(json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"].lower())
    with patch_attr(kind, "require_load_processor", False) if kind else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _scratch(parent: Path | None) -> Iterator[None]:
    """Work in a temporary folder, in `parent` if there is one: GPTQModel makes logs/ wherever it runs, and OFFLOAD."""
    with tempfile.TemporaryDirectory(dir=parent) as folder, contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _warnings(events: Events) -> Iterator[None]:
    """Make a note of every distinct warning and error line that GPTQModel prints."""
    tee = _Tee()
    try:
        with contextlib.redirect_stdout(tee):
            yield
    finally:
        lines = [line.strip() for line in tee.text.replace("\r", "\n").splitlines()]
        for line in dict.fromkeys(line for line in lines if line.startswith(("WARN", "ERROR"))):
            if not any(words in line for words in HARMLESS):
                events.note("gptqmodel", line.split(maxsplit=1)[-1])


class _Tee(io.TextIOBase):
    """Passes text on to the stdout that was there, and keeps it."""

    def __init__(self) -> None:
        self.text = ""
        self._below = sys.stdout

    def write(self, text: str) -> int:
        self.text += text
        return self._below.write(text)

    def flush(self) -> None:
        self._below.flush()


def _record(name: str, entry: dict[str, Any]) -> LayerRecord:
    """One line of its log; a loss in words becomes None here and a note in _note_habits."""
    try:
        loss = float(entry["loss"])
    except ValueError:
        loss = None
    return LayerRecord(
        name=name,
        loss=loss,
        tokens=int(entry.get("activation_retained_tokens", entry["samples"])),
        damp=float(entry["damp"]) if "damp" in entry else None,
    )


def _note_rope(config: Any, *, events: Events) -> None:
    """Note position embeddings that differ by layer type; `rope_parameters` holds them under the type's name."""
    types: list[str] = list(getattr(config, "layer_types", None) or [])
    if len({str(config.rope_parameters.get(name)) for name in types}) > 1:
        other = [number for number, name in enumerate(types) if name != types[0]]
        events.note(
            "rope",
            "position embeddings differ by layer type here, and GPTQModel calibrates all layers with those of "
            f"{types[0]}: layers {other} do not see the positions that they will serve with",
        )


def _note_habits(
    layers: list[LayerRecord],
    entries: dict[str, dict[str, Any]],
    names: list[str],
    *,
    params: dict[str, Any],
    tokens: int,
    events: Events,
) -> None:
    note_skipped(names, [layer.name for layer in layers], events=events)
    note_tokens(layers, tokens=tokens, events=events)
    raised = {layer.name: layer.damp for layer in layers if layer.damp is not None and layer.damp > params["damp"]}
    if raised:
        events.note("damping", f"raised from {params['damp']} where the Hessian did not factor: {raised}")
    for words, without in _losses_in_words(layers, entries).items():
        events.note("layers without a loss", f"{len(without)}, in GPTQModel's words {words}: {', '.join(without)}")


def _losses_in_words(layers: list[LayerRecord], entries: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Layers by what stands where a loss should, without its numbers.

    `fallback(rtn)`: rounded to nearest, because hardly any token reached it. `not applicable`: AWQ quantized it
    without scaling (o_proj under grouped-query attention).
    """
    by_words: dict[str, list[str]] = {}
    for layer in layers:
        if layer.loss is None:
            by_words.setdefault(f"`{entries[layer.name]['loss'].split(':')[0]}`", []).append(layer.name)
    return by_words
