"""How an artifact is served: serve.json, and serve.md for readers. Commands are run in the artifact's folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recipes.models.headers import Headers
from recipes.plain import is_mapping
from recipes.problem import Problem
from recipes.schemes.engines import cautions, loaders, parallel_sizes, refusals
from recipes.schemes.ranks import ServedModel
from recipes.schemes.reads import NAMES, needs_of
from recipes.schemes.scheme import Scheme, listed

SCHEMA = 1
DTYPE = "bfloat16"  # what models are trained, merged and evaluated in
WHY_DTYPE = (
    "the model was trained and evaluated in bf16. fp16 ends at 65,504; activations of a model that was trained in bf16 "
    "can be larger, and fp16 kernels overflow then (vllm#1941, #16579). Take --dtype float16 only on GPUs without bf16 "
    "(before compute capability 8.0), and try your own prompts first."
)
BF16_NEEDS: dict[str, str] = {"transformers": "", "vllm": ""}  # who reads what is not quantized, and with what
# What its builder would round to 4 bits on top of the file's own codes.
ONNX_UNTOUCHED = ("/lm_head/MatMul", "/model/embed_tokens/Gather")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank


class ServedAdapter(NamedTuple):
    """A LoRA adapter that is served on top of a base.

    Attributes:
        rank: Its largest rank.
        plain: No DoRA and no modules trained in full: what vLLM reads.
        nf4: The base is quantized to NF4 on loading.
        tokenizer: Folder of the tokenizer in the export.
    """

    rank: int
    plain: bool
    nf4: bool
    tokenizer: str

    @classmethod
    def read(cls, folder: Path, *, nf4: bool) -> ServedAdapter:
        """From adapter_config.json."""
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        patterns: dict[str, int] = config.get("rank_pattern") or {}
        rank = max([int(config["r"]), *patterns.values()])
        plain = not (config.get("use_dora") or config.get("modules_to_save"))
        tokenizer = "adapter/tokenizer" if (folder / "tokenizer").is_dir() else "base"
        return cls(rank=rank, plain=plain, nf4=nf4, tokenizer=tokenizer)

    def refusal(self, name: str) -> Problem | None:
        """Why there is no command for vLLM."""
        if self.nf4:
            why = "No source says that it loads a base as NF4 with double quantization under an adapter."
        elif not self.plain:
            why = "It reads neither DoRA nor modules that were trained in full."
        elif self.rank > RANKS[-1]:
            why = f"Its largest --max-lora-rank is {RANKS[-1]}, the adapter's {self.rank}."
        else:
            return None
        return Problem(what=f"vLLM does not serve {name}.", where=name, why=why, next="Serve a merged arm.")

    def options(self, name: str) -> list[str]:
        """vLLM's, for the adapter under the name of the arm."""
        rank = next((size for size in RANKS if size >= self.rank), RANKS[-1])
        lora = ["--enable-lora", "--lora-modules", f"{name}=$PWD/adapter", "--max-lora-rank", str(rank)]
        return [*lora, "--tokenizer", f"$PWD/{self.tokenizer}"]


def describe(
    headers: Headers,
    *,
    name: str,
    scheme: Scheme | None,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
    adapter: ServedAdapter | None = None,
) -> dict[str, Any]:
    """What serve.json holds.

    Args:
        headers: Of the model in bf16: shapes, longest context, chat template.
        name: Of the artifact; the name under which it is served.
        scheme: How it is quantized; None where it is not.
        tensor_parallel: GPUs that each layer is split over.
        max_model_len: Tokens of prompt and answer; default: the longest context.
        adapter: What is loaded on top; then the model is in base/ and the adapter in adapter/.
    """
    length = max_model_len or headers.max_positions
    return {
        "schema": SCHEMA,
        "name": name,
        "scheme": scheme.slug if scheme else None,
        "form": scheme.form if scheme else "bf16",
        "dtype": DTYPE,
        "max_model_len": length,
        "chat_template": headers.has_chat_template,
        "template_args": dict(headers.template.args),
        "template_date": headers.template.day,
        "kv_scales": bool(scheme and scheme.kv_scales),
        "dequantize": bool(scheme and scheme.form == "compressed-tensors" and not scheme.grid.symmetric),
        "adapter": adapter._asdict() if adapter else None,
        **auto_class(headers.config),
        "loaders": _loaders(scheme, adapter),
        "vllm": _vllm(headers, name, scheme, ranks=tensor_parallel, length=length, adapter=adapter),
        "onnxruntime-genai": _onnx(headers, name, scheme, adapter=adapter),
    }


def auto_class(config: Mapping[str, Any]) -> dict[str, str]:
    """`auto_class` of a model with towers, which AutoModelForCausalLM would leave out; nothing for a text model."""
    named = (config.get("architectures") or [""])[0]
    if not is_mapping(config.get("text_config")) or named.endswith("ForCausalLM"):
        return {}
    return {"auto_class": "AutoModelForMultimodalLM"}


def _loaders(scheme: Scheme | None, adapter: ServedAdapter | None) -> dict[str, str]:
    """Who reads it, and what has to be installed beside the engine."""
    by_engine = dict(BF16_NEEDS)
    if scheme is not None:
        by_engine = {engine: ", ".join(needs_of(scheme, engine)) for engine in loaders(scheme)}
    if adapter is None:
        return by_engine
    needs = ", ".join(filter(None, (by_engine["transformers"], "peft", "bitsandbytes" if adapter.nf4 else "")))
    return {"transformers": needs} if adapter.nf4 else {"transformers": needs, "vllm": by_engine.get("vllm", "")}


def _vllm(
    headers: Headers, name: str, scheme: Scheme | None, *, ranks: int, length: int | None, adapter: ServedAdapter | None
) -> dict[str, Any]:
    """The command, or why there is none."""
    model = ServedModel.of(headers)
    sizes = parallel_sizes(scheme, model, engine="vllm")
    refused = refusals(scheme, model, engine="vllm", tensor_parallel=ranks)
    careful = cautions(scheme, model, engine="vllm", tensor_parallel=ranks) if scheme else []
    if adapter and (problem := adapter.refusal(name)):
        refused.append(problem)
    command = ["vllm", "serve", "$PWD/base" if adapter else "$PWD"]
    command += adapter.options(name) if adapter else ["--served-model-name", name]
    command += ["--dtype", DTYPE]
    command += ["--max-model-len", str(length)] if length else []
    if args := headers.template.args:
        command += ["--default-chat-template-kwargs", json.dumps(args, ensure_ascii=False)]
    command += ["--tensor-parallel-size", str(ranks)]
    return {
        "command": None if refused else command,
        "refused": [problem.as_dict() for problem in refused],
        "cautions": [problem.as_dict() for problem in careful],
        "tensor_parallel_sizes": list(sizes),
    }


def _onnx(headers: Headers, name: str, scheme: Scheme | None, *, adapter: ServedAdapter | None) -> dict[str, Any]:
    """The builder's command, or why there is none. $OUT is the folder that it makes."""
    refused = refusals(scheme, ServedModel.of(headers), engine="onnxruntime-genai")
    if adapter or auto_class(headers.config):
        why = "Nobody tried its builder on an adapter." if adapter else "It would leave the towers out."
        what = f"ONNX Runtime GenAI does not serve {name}."
        refused.append(Problem(what=what, where=name, why=why, next="Serve it with vLLM."))
    convert = None if refused else onnx_command(quantized=scheme is not None)
    return {"convert": convert, "refused": [problem.as_dict() for problem in refused]}


def onnx_command(*, quantized: bool) -> list[str]:
    """The words by which its builder converts a folder, $PWD, into $OUT: the file's own codes, activations in fp32."""
    command = ["python", "-m", "onnxruntime_genai.models.builder", "-i", "$PWD", "-o", "$OUT", "-e", "cpu"]
    command += ["-p", "int4" if quantized else "fp32", "--extra_options", "hf_token=false"]
    return command + (["accuracy_level=1", f"nodes_to_exclude={','.join(ONNX_UNTOUCHED)}"] if quantized else [])


def readable(served: Mapping[str, Any]) -> str:
    """serve.md."""
    lines = [f"# Serving {served['name']}", "", "Commands are run in this folder.", "", "## vLLM", ""]
    lines += _vllm_lines(served) if served["vllm"]["command"] else _refused_lines(served)
    lines += ["", "## transformers", ""]
    if needs := served["loaders"].get("transformers"):
        lines += [f"It needs {needs}.", ""]
    lines += python_lines(served)
    lines += _onnx_lines(served)
    others = [f"{NAMES[engine]}{f' (with {needs})' if needs else ''}" for engine, needs in _others(served)]
    if others:
        lines += ["", f"These read it, too: {', '.join(others)}."]
    return "\n".join(lines) + "\n"


def _others(served: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    shown = {*BF16_NEEDS, "onnxruntime-genai"}
    yield from ((engine, needs) for engine, needs in served["loaders"].items() if engine not in shown)


def shell(command: list[str]) -> str:
    """The command as it is typed; $PWD and $OUT are left to the shell."""
    return " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in command)


def _vllm_lines(served: Mapping[str, Any]) -> Iterator[str]:
    vllm = served["vllm"]
    yield from ["```", shell(vllm["command"]), "```", ""]
    if needs := served["loaders"].get("vllm"):
        yield f"* It needs {needs}."
    if served["scheme"]:
        yield "* No --quantization: vLLM reads the method from config.json and picks the fastest kernel for it."
    yield f"* --dtype {served['dtype']}: {WHY_DTYPE}"
    if served["max_model_len"]:
        yield f"* --max-model-len {served['max_model_len']}: prompt and answer; less leaves memory for more requests."
    sizes = listed(vllm["tensor_parallel_sizes"])
    yield f"* --tensor-parallel-size: of 1, 2, 4 and 8 GPUs {sizes} can share it, by heads, shapes and groups."
    if served["chat_template"]:
        yield "* No --chat-template: the template stands beside the tokenizer, and vLLM reads it there."
    else:
        yield "* The folder has no chat template: name one by --chat-template."
    yield from _template_lines(served)
    yield _kv_line(served["kv_scales"])
    for caution in vllm["cautions"]:
        yield f"* {caution['what']} {caution['why']}"


def _onnx_lines(served: Mapping[str, Any]) -> Iterator[str]:
    """Nothing where it does not read the files."""
    command = served.get("onnxruntime-genai", {}).get("convert")
    if command is None:
        return
    yield from ["", "## ONNX Runtime GenAI, on a CPU", "", "It converts the files once, and runs what it made.", ""]
    yield from ["```", "OUT=../onnx", shell(command), "```", ""]
    if served["scheme"]:
        yield (
            "* nodes_to_exclude: without it the builder rounds embeddings and output layer, which are in bf16 here, to "
            "4 bits by itself; that is another model than was measured."
        )
        yield (
            "* accuracy_level=1: activations stay in fp32. Its default on a CPU, 4, rounds them to 8 bits: faster, and "
            "not what was measured."
        )
    yield from ["", "```python", "import onnxruntime_genai as og", ""]
    yield from ['model = og.Model("../onnx")', "tokenizer = og.Tokenizer(model)", "params = og.GeneratorParams(model)"]
    yield from ["params.set_search_options(max_length=512, do_sample=False)", "generator = og.Generator(model, params)"]
    yield from ['generator.append_tokens(tokenizer.encode("..."))', "while not generator.is_done():"]
    yield from ["    generator.generate_next_token()", "print(tokenizer.decode(generator.get_sequence(0)))", "```"]


def _template_lines(served: Mapping[str, Any]) -> Iterator[str]:
    if served["template_args"]:
        yield (
            "* --default-chat-template-kwargs: model and figures were made with these arguments of its template. "
            "A request can name others by chat_template_kwargs; its answers are not those that were measured."
        )
    if served["template_date"]:
        yield (
            f"* The template prints the day. It was {served['template_date']} in training and evaluation; an engine "
            "prints its own day, and the figures are not of that prompt to the letter."
        )


def _kv_line(calibrated: bool) -> str:
    if calibrated:
        return (
            "* FP8 scales of the KV cache were calibrated and stand in the files: --kv-cache-dtype fp8 uses them. "
            "transformers applies them always, so the arm's figures hold what they cost; without the flag the cache "
            "stays in bf16."
        )
    return "* No --kv-cache-dtype: no scales were calibrated, so an FP8 cache would take 1.0 for all of them."


def _refused_lines(served: Mapping[str, Any]) -> Iterator[str]:
    for problem in served["vllm"]["refused"]:
        yield f"{problem['what']} {problem['why']} {problem['next']}"


def python_lines(served: Mapping[str, Any]) -> Iterator[str]:
    """Python that loads model and tokenizer with transformers, as Markdown."""
    adapter = served["adapter"]
    settings = f'dtype=torch.{served["dtype"]}, device_map="auto"'
    yield "```python"
    yield "import torch"
    if adapter:
        yield "from peft import PeftModel"
    nf4 = bool(adapter and adapter["nf4"])
    more = ", BitsAndBytesConfig" if nf4 else ", CompressedTensorsConfig" if served["dequantize"] else ""
    auto = served.get("auto_class", "AutoModelForCausalLM")
    yield f"from transformers import {auto}, AutoTokenizer{more}"
    yield ""
    if nf4:
        yield 'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,'
        yield f"                         bnb_4bit_compute_dtype=torch.{served['dtype']})"
        settings += ", quantization_config=nf4"
    if served["dequantize"]:  # without it, transformers 5.23 raises at the zero points
        settings += ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    yield f'model = {auto}.from_pretrained("{"base" if adapter else "."}", {settings})'
    if adapter:
        yield 'model = PeftModel.from_pretrained(model, "adapter")'
    yield f'tokenizer = AutoTokenizer.from_pretrained("{adapter["tokenizer"] if adapter else "."}")'
    yield "```"
    if args := served.get("template_args"):
        given = ", ".join(f"{name}={value!r}" for name, value in args.items())
        yield from ("", f"Every prompt is rendered with the template's arguments: `apply_chat_template(..., {given})`.")


def write(folder: Path, served: Mapping[str, Any]) -> None:
    """serve.json and serve.md. The same model and scheme give the same bytes."""
    (folder / "serve.json").write_text(json.dumps(served, indent=2) + "\n", encoding="utf-8")
    (folder / "serve.md").write_text(readable(served), encoding="utf-8")
