"""What a recipe's `train:` and `run:` need of the base and of the device."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from difflib import get_close_matches

from recipes.checks.serving import schemes
from recipes.models.decoder import layer_number
from recipes.models.headers import Headers, read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded
from recipes.schema import Recipe
from recipes.schemes.limits import GIB, UNQUANTIZED, left_in_bf16, size_bytes

COMPOSITE_ROOTS = ("model.language_model", "model.text_model")  # of modules; names of the checkpoint may differ
# `model_type`s whose classes of transformers 5.23 compute attention without sdpa: soft caps, sinks, or old code.
WITHOUT_SDPA = (
    *("bloom", "codegen", "cpmant", "deepseek_v4", "flint", "gemma2", "gpt_neo", "gpt_neox_japanese", "gpt_oss"),
    *("gptj", "granite_swa", "granitemoe_swa", "hy_v4", "inkling2", "inkling2_text", "mimo_v2_flash", "mpt"),
    *("vaultgemma", "xglm"),
)


def train_problems(loaded: Loaded, headers: Headers) -> Iterator[Problem]:
    """Names that the base's text decoder does not have, and experts that stay bf16."""
    yield from _attention(loaded.recipe, headers)
    yield from _targets(loaded.recipe, headers)
    yield from _patterns(loaded.recipe, headers)
    yield from _modules_to_save(loaded.recipe, headers)
    yield from _unquantized(loaded.recipe, headers)


def device_problems(recipe: Recipe, *, device: str, gpus: int | None = None) -> Iterator[Problem]:
    """What training needs of the device.

    Args:
        recipe: The recipe.
        device: `auto`, where it is not known yet, `cpu` or `cuda`.
        gpus: How many are visible; None where it is not known yet.
    """
    train, run = recipe.train, recipe.run
    flash = train.attention == "flash_attention_2"
    if flash and (device == "cpu" or importlib.util.find_spec("flash_attn") is None):
        yield Problem(
            what="train.attention flash_attention_2 does not run here.",
            where="train.attention",
            why="Its kernels are for NVIDIA GPUs." if device == "cpu" else "The package flash-attn is not installed.",
            next="Set train.attention: sdpa, which runs everywhere, or install flash-attn on a machine with a GPU.",
        )
    if device == "cpu" and run.launcher == "fsdp-qlora" and run.processes > 1:
        yield Problem(
            what="run.launcher fsdp-qlora does not run on a CPU.",
            where="run.launcher",
            why="It shards the 4-bit base over several GPUs.",
            next="Set run.launcher: ddp.",
        )
    if device == "cuda" and gpus is not None and run.processes > gpus:
        yield Problem(
            what=f"run.processes is {run.processes}; {gpus} GPU(s) are visible.",
            where="run.processes",
            why="Each process of a training has a GPU of its own.",
            next=f"Set run.processes to {gpus} or less, or make more GPUs visible (CUDA_VISIBLE_DEVICES).",
        )


def without_sdpa(headers: Headers) -> bool:
    """No sdpa for this architecture: `train.attention: eager` is what trains it."""
    return headers.text_config.get("model_type") in WITHOUT_SDPA


def _attention(recipe: Recipe, headers: Headers) -> Iterator[Problem]:
    if recipe.train.attention == "sdpa" and without_sdpa(headers):
        yield Problem(
            what=f"train.attention sdpa does not run with {headers.text_config.get('model_type')} models.",
            where="train.attention",
            why="Their attention does what sdpa's kernels do not (soft caps, sinks), and transformers refuses it.",
            next="Set train.attention: eager.",
        )


def _targets(recipe: Recipe, headers: Headers) -> Iterator[Problem]:
    targets = recipe.train.targets
    known = sorted({layer.name.rpartition(".")[2] for layer in headers.linears})
    for index, name in enumerate([] if isinstance(targets, str) else targets):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            yield Problem(
                what=f"No linear layer of the base{_text_part(headers)} is called {name}.",
                where=f"train.targets.{index}",
                why=f"Its layers are called {', '.join(known)}.",
                next=f"Did you mean {near[0]}?" if near else "Name one of these, or write all-linear.",
            )


def _text_part(headers: Headers) -> str:
    return "'s text decoder" if headers.towers else ""


def _patterns(recipe: Recipe, headers: Headers) -> Iterator[Problem]:
    """Keys that PEFT would ignore without a word: they match no layer with an adapter."""
    names = [layer.name for layer in headers.linears if recipe.train.adapts(layer.name)]
    modules = [module for name in names for module in _modules(name, headers)]
    fields = {"rank_pattern": recipe.train.rank_pattern, "alpha_pattern": recipe.train.alpha_pattern}
    for field, patterns in fields.items():
        for key in patterns:
            try:
                matches = any(re.match(rf"(.*\.)?({key})$", name) for name in modules)  # PEFT's get_pattern_key
            except re.error as error:
                matches, why = False, f"It is no regular expression: {error}."
            else:
                why = f"Layers with an adapter are called like {names[0] if names else '(none)'}."
            if not matches:
                yield Problem(
                    what=f"train.{field} names no layer that gets an adapter: {key}.",
                    where=f"train.{field}",
                    why=why,
                    next="Write the end of a module's name, such as q_proj or layers.0.mlp.down_proj.",
                )


def _modules_to_save(recipe: Recipe, headers: Headers) -> Iterator[Problem]:
    """PEFT takes every module whose full name ends so, those of towers among them."""
    quantized = {layer.name for layer in headers.dense_linears}
    outside = {tensor.name.rpartition(".")[0] for tensor in (*headers.towers, *headers.dropped)}
    known = {name.rpartition(".")[0] for name in headers.tensors} - quantized - outside
    known |= {"lm_head"} if headers.tied else set()
    modules = [module for name in known for module in _modules(name, headers)]
    for index, end in enumerate(recipe.train.modules_to_save):
        refused = sorted(name for name in quantized if name.endswith(end))
        towers = sorted(name for name in outside if name.endswith(end))
        if refused or towers or not any(name.endswith(end) for name in modules):
            shown = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            why = f"What stays unquantized is called {shown}."
            if towers:
                why = f"{towers[0]} is called so, too, and what is no text decoder is left as it is."
            if refused:
                why = f"{refused[0]} is quantized to NF4 in training, and 4-bit weights cannot be trained."
            yield Problem(
                what=f"train.modules_to_save cannot train {end}.",
                where=f"train.modules_to_save.{index}",
                why=why,
                next="Give it an adapter with train.targets."
                if refused
                else "Write more of the name, such as language_model.norm."
                if towers
                else "Name one of these.",
            )


def _modules(name: str, headers: Headers) -> list[str]:
    """Names that a module of the text decoder has when it is loaded: a composite's checkpoint may call it otherwise."""
    place = layer_number(headers.linears[0].name)
    root = place[0].rstrip(".").rpartition(".")[0] if place else ""
    if "text_config" not in headers.config or not name.startswith(root):
        return [name]
    rest = name.removeprefix(root).removeprefix(".")
    return [name, *(f"{other}.{rest}" for other in COMPOSITE_ROOTS)]


def unquantized_warnings(loaded: Loaded) -> list[Problem]:
    """What of a mixture stays in bf16, in training and in every scheme, where the base is local."""
    if loaded.base is None:
        return []
    try:
        headers = read_headers(loaded.base)
    except RecipeError:  # check reports it
        return []
    return [loaded.placed(problem) for problem in _kept(loaded.recipe, headers)]


def _kept(recipe: Recipe, headers: Headers) -> Iterator[Problem]:
    experts = headers.expert_parameters
    if not experts:
        return
    yield Problem(
        what=f"{2 * experts / GIB:.1f} GiB of experts stay in bf16 in training and in the arm nf4-adapter.",
        where="model.base",
        why="transformers holds a mixture's experts as 3-D parameters, which bitsandbytes does not quantize.",
        next="Plan for that memory: quench plan RECIPE.",
    )
    for field, scheme in schemes(recipe):
        if kept := left_in_bf16(scheme, headers):
            yield Problem(
                what=f"{scheme.slug} leaves {2 * kept / GIB:.1f} GiB of experts in bf16; its weights take "
                f"{size_bytes(scheme, headers) / GIB:.1f} GiB.",
                where=field,
                why=f"{scheme.backend} quantizes the other linear layers only.",
                next=f"Compare it with what the base takes: {2 * headers.parameters / GIB:.1f} GiB in bf16.",
            )


def _unquantized(recipe: Recipe, headers: Headers) -> Iterator[Problem]:
    experts = headers.expert_parameters
    share = experts / max(1, experts + headers.dense_linear_parameters)
    if share > UNQUANTIZED and not recipe.train.accept_unquantized:
        yield Problem(
            what=f"{share:.0%} of the base's linear weights would stay bf16 in training: {2 * experts / GIB:.1f} "
            "GiB of experts.",
            where="train.accept_unquantized",
            why="transformers holds a mixture's experts as 3-D parameters, which bitsandbytes does not quantize.",
            next="Set train.accept_unquantized: true if that memory is there, or take a dense base.",
        )
    if experts and recipe.train.dropout and recipe.train.targets == "all-linear":
        yield Problem(
            what="train.dropout does not go with adapters on experts.",
            where="train.dropout",
            why="all-linear includes a mixture's experts, and PEFT cannot drop inputs of 3-D parameters.",
            next="Set train.dropout: 0, or name layers of the attention in train.targets.",
        )
