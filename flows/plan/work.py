"""Tokens and floating-point operations of every step, from the recipe, the headers and the rows' lengths.

Per token a forward pass takes 2 N operations, N the weights that a token meets in matrix products; a backward pass
takes 2 N for the gradients of activations and 2 N for those of weights (Kaplan et al. 2020, arXiv:2001.08361, section
2.1: 6 N in all). Left out, as there: attention scores, norms and look-ups of embeddings. N counts the linear layers of
the text decoder and the output layer; of a mixture's experts those that a token is routed to.
"""

from __future__ import annotations

from typing import NamedTuple

from flows.plan.mixtures import routed_share
from flows.plan.row_sizes import RowSizes
from flows.plan.sizes import GIB, saved_parameters
from recipes.arms import FLOOR, Arm, arms
from recipes.models.headers import Headers
from recipes.nulls import KINDS
from recipes.schema import Recipe
from recipes.schemes.scheme import Scheme

AWQ_RATIOS = 20  # scales that AWQ tries per group of layers (n_grid in GPTQModel 7.6 and in llm-compressor)


class Work(NamedTuple):
    """Tokens that a step reads or writes, padding not counted, and floating-point operations."""

    tokens: float
    flops: float


def work(recipe: Recipe, headers: Headers, rows: RowSizes | None) -> dict[str, Work]:
    """Of each step that computes with a model, by key; nothing where the rows are not known.

    Args:
        recipe: The recipe.
        headers: Of the base. External models count as large as it.
        rows: Sizes of the data's rows, estimated and rather high.
    """
    if rows is None:
        return {}
    every = [arm for arm in arms(recipe) if arm.unavailable is None]
    by_key = {f"reference/{recipe.name}": _reference(recipe, headers, rows)}
    if recipe.train.adapter is None:
        by_key[f"train/{recipe.name}"] = _train(recipe, headers, rows)
    for arm in every:
        if arm.scheme is not None and arm.of is None:
            by_key[f"quantize/{arm.slug}"] = _quantize(recipe, headers, rows, arm.scheme)
        by_key[f"evaluate/{arm.slug}"] = _evaluated(recipe, headers, rows, chosen_by_dev=arm.may_be_promoted)
        if arm.of is None:
            by_key[f"measure/{arm.slug}"] = _measure(recipe, headers, arm)
    evaluated = _evaluated(recipe, headers, rows, chosen_by_dev=False)
    nulls = {f"evaluate/{FLOOR}.null-{kind}": evaluated for kind in KINDS}  # which there are, depends on the machine
    return by_key | nulls


def active_linear_parameters(headers: Headers) -> float:
    """Weights of the decoder's linear layers that one token meets."""
    return headers.dense_linear_parameters + headers.expert_parameters * routed_share(headers)


def active_parameters(headers: Headers) -> float:
    """Weights that one token meets in matrix products: linear layers and output layer."""
    return active_linear_parameters(headers) + headers.vocabulary * headers.hidden


def _mean_tokens(recipe: Recipe, rows: RowSizes) -> float:
    return min(rows.tokens, recipe.data.max_length)


def _train(recipe: Recipe, headers: Headers, rows: RowSizes) -> Work:
    """4 N a token: forward, and the gradients of activations; frozen weights have none of their own.

    Recomputing activations (gradient checkpointing) is one more forward pass: 6 N. Modules trained in full have
    gradients of their own, 2 operations a weight. LoRA's matrices (6 a weight, 3 % of the rest at rank 64 of an 8B) and
    the dev losses are left out.
    """
    train, data = recipe.train, recipe.data
    in_epoch = rows.rows * max(0.0, 1 - data.dev - data.test)
    count = train.max_steps * train.batch_size if train.max_steps else train.epochs * in_epoch
    tokens = count * _mean_tokens(recipe, rows)
    passes = 6 if train.gradient_checkpointing else 4
    return Work(tokens, (passes * active_parameters(headers) + 2 * saved_parameters(recipe, headers)) * tokens)


def _held_out(recipe: Recipe, rows: RowSizes) -> float:
    """Rows of dev and test."""
    return rows.rows * (recipe.data.dev + recipe.data.test)


def _reference(recipe: Recipe, headers: Headers, rows: RowSizes) -> Work:
    """One forward pass, 2 N a token, over the rows whose bf16 logits fit evaluate.reference_gib."""
    count = _held_out(recipe, rows)
    stored = 2 * count * rows.completion_tokens * headers.vocabulary
    share = min(1.0, recipe.evaluate.reference_gib * GIB / stored) if stored else 1.0
    tokens = share * count * _mean_tokens(recipe, rows)
    return Work(tokens, 2 * active_parameters(headers) * tokens)


def _evaluated(recipe: Recipe, headers: Headers, rows: RowSizes, *, chosen_by_dev: bool) -> Work:
    """2 N a token: one forward pass over each row of dev and test, and one answer to each, or to those of test alone.

    Answers count as long as the reference answers. The general hold-out and lm-eval tasks are left out.
    """
    mean = _mean_tokens(recipe, rows)
    answer = min(rows.completion_tokens, recipe.evaluate.max_new_tokens)
    decoded = max(0.0, mean - rows.completion_tokens) + answer
    answered = rows.rows * (recipe.data.test + (recipe.data.dev if chosen_by_dev else 0))
    tokens = _held_out(recipe, rows) * mean + answered * decoded
    return Work(tokens, 2 * active_parameters(headers) * tokens)


def _quantize(recipe: Recipe, headers: Headers, rows: RowSizes, scheme: Scheme) -> Work:
    """2 N a token and forward pass, N the linear layers.

    GPTQ: two passes (for the Hessians, and with the quantized layer), and 2 x inputs^2 a token and layer for the
    Hessians. AWQ: two passes, and one per ratio that it tries. Rounding to nearest reads no token.
    """
    if not scheme.needs_calibration:
        return Work(0.0, 0.0)
    tokens = recipe.calibrate.rows * min(_mean_tokens(recipe, rows), recipe.calibrate.seq_len)
    passes = 2 * active_linear_parameters(headers)
    if scheme.method == "awq":
        return Work(tokens, (2 + AWQ_RATIOS) * passes * tokens)
    share = routed_share(headers)
    dense = set(headers.dense_linears)
    hessians = sum((1.0 if layer in dense else share) * layer.in_features**2 for layer in headers.linears)
    return Work(tokens, (2 * passes + 2 * hessians) * tokens)


def _measure(recipe: Recipe, headers: Headers, arm: Arm) -> Work:
    """2 N a token of prompts and answers, one more time than is timed."""
    measure = recipe.measure
    tokens = (1 + measure.repeats) * measure.batch * (measure.prompt_tokens + measure.new_tokens)
    return Work(tokens, 2 * active_parameters(headers) * tokens)
