"""Rows that were put aside answer as in a batch that decodes to its end; in fp32, so that noise decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3NextConfig,
)

from recipes.arms import KV, KV_CACHES
from tasks.jobs.measuring.decoding import Decoded, Decoder
from tasks.jobs.measuring.kv_cache import KVCache
from tasks.jobs.measuring.teacher_forcing import TokenRow
from tests.jobs.measuring.test_kv_cache import WINDOW, quantized
from tests.jobs.measuring.test_tiles import IDS, MODELS, TEXT, VOCABULARY, written_here

LIMIT, SIZE, QUARTER = 24, 8, 1 / 4
CACHES = MODELS | {
    "a sliding window": written_here(MistralConfig(**TEXT, sliding_window=WINDOW)),
    "a state": written_here(
        Mamba2Config(**IDS, hidden_size=64, num_heads=8, head_dim=16, state_size=8, n_groups=1, num_hidden_layers=2)
    ),
    "states and keys": written_here(
        Qwen3NextConfig(
            **TEXT | {"num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
            shared_expert_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
}


def asked(number: int = 26) -> list[TokenRow]:
    """Rows with prompts of 6 to 30 tokens; the order in which they begin is not that of their answers' lengths."""
    draw = torch.Generator().manual_seed(5)
    rows: list[TokenRow] = []
    for at in range(number):
        prompt = torch.randint(4, 300, (6 + 7 * at % 25,), generator=draw).tolist()
        ids = [*prompt, *[4] * (1 + at % 5)]
        rows.append(TokenRow(row=f"{at:02}", group="", split="test", ids=ids, counted=[], prompt_ids=prompt))
    return rows


class Counted(NamedTuple):
    """Answers by row, and the batches that the model was given: [rows, tokens]."""

    answers: dict[str, Decoded]
    shapes: list[tuple[int, int]]

    @property
    def row_steps(self) -> int:
        return sum(rows for rows, _ in self.shapes)


def counted(model: Any, rows: Sequence[TokenRow], config: GenerationConfig, left: float, caches: Any = None) -> Counted:
    shapes: list[tuple[int, int]] = []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    decoder = Decoder(model=model, config=config, size=SIZE, left=left, caches=caches)
    told = [(row.row, answer) for row, answer in decoder.answers(rows)]
    hook.remove()
    assert len(told) == len(dict(told)) == len(rows)
    return Counted(dict(told), shapes)


def talking(name: str) -> Any:
    """A model whose weights are large enough that it does not say the same token again and again."""
    torch.manual_seed(0)
    model = CACHES[name]().float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return model


def ending(model: Any, rows: Sequence[TokenRow], caches: Any = None) -> GenerationConfig:
    """Ends that most rows say early, and a few late or never: tokens of their own answers."""
    endless = GenerationConfig(max_new_tokens=LIMIT, do_sample=False, eos_token_id=[VOCABULARY], pad_token_id=0)
    said = counted(model, rows, endless, 0.0, caches).answers
    ends: list[int] = []
    for at, row in enumerate(rows):  # until four of five have ended; the first of them with its first token
        if sum(any(end in one.tokens for end in ends) for one in said.values()) >= 0.8 * len(rows):
            break
        tokens = said[row.row].tokens
        if not any(end in tokens for end in ends):
            ends.append(tokens[min(3 * at % 11, len(tokens) - 1)])
    return GenerationConfig(max_new_tokens=LIMIT, do_sample=False, eos_token_id=ends, pad_token_id=ends[-1])


def assert_equal_answers(model: Any, caches: Any = None) -> None:
    rows = asked()
    config = ending(model, rows, caches)
    whole = counted(model, rows, config, 0.0, caches)
    aside = counted(model, rows, config, QUARTER, caches)
    assert aside.answers == whole.answers
    assert len({len(answer.tokens) for answer in whole.answers.values()}) > 1
    wide = [tokens for _, tokens in aside.shapes if tokens > 1]
    assert len(wide) > len([tokens for _, tokens in whole.shapes if tokens > 1])  # some went on elsewhere
    assert aside.row_steps < whole.row_steps


@pytest.mark.parametrize("name", CACHES)
def test_answers_are_those_of_whole_batches(name: str) -> None:
    assert_equal_answers(talking(name))


@pytest.mark.parametrize("kind", KV_CACHES)
def test_answers_through_a_quantized_cache(kind: KV, tmp_path: Path) -> None:
    model = talking("a sliding window").double()  # a cache rounds: what is 1e-7 apart may be a step apart
    caches: KVCache = quantized(model, kind, tmp_path)
    assert_equal_answers(model, caches)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return talking("tied")


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_no_answer_is_longer_than_the_limit(limit: int, llama: PreTrainedModel) -> None:
    """Also of a row that goes on beside one that has said less."""
    rows = asked()
    config = ending(llama, rows)
    config.max_new_tokens = limit
    found = counted(llama, rows, config, QUARTER).answers
    assert found == counted(llama, rows, config, 0.0).answers
    cut = [answer for answer in found.values() if not answer.ended]
    assert cut and all(len(answer.tokens) == limit for answer in cut)


def test_one_endless_answer_a_batch_does_not_hold_the_others(llama: PreTrainedModel) -> None:
    """Each batch begins with a row that runs to the limit: whole, all four do; aside, one batch of these rows does."""
    rows = asked()
    config = GenerationConfig(max_new_tokens=48, do_sample=False, eos_token_id=[VOCABULARY], pad_token_id=0)
    said = {name: answer.tokens for name, answer in counted(llama, rows, config, 0.0).answers.items()}
    endless = rows[0]
    ends = {row.row: set(said[row.row][:10]) - set(said[endless.row]) for row in rows[1:]}
    early = [row for row in rows[1:] if ends[row.row]][: SIZE - 1]
    assert len(early) == SIZE - 1
    config.eos_token_id = [min(ends[row.row]) for row in early]
    mixed = [
        TokenRow(row=f"{at:03}", group="", split="test", ids=row.prompt_ids, counted=[], prompt_ids=row.prompt_ids)
        for at, row in enumerate([endless, *early] * 4)
    ]
    whole, aside = (counted(llama, mixed, config, left) for left in (0.0, 1 / 8))
    assert aside.answers == whole.answers and sum(not answer.ended for answer in whole.answers.values()) == 4
    assert len(whole.shapes) == 4 * 48
    assert len(aside.shapes) < 48 + 4 * 10 + 1


def test_rows_that_begin_are_counted_batch_by_batch(llama: PreTrainedModel) -> None:
    rows, begun = asked(), []
    config = ending(llama, rows)
    decoder = Decoder(model=llama, config=config, size=SIZE, left=QUARTER)
    assert len(list(decoder.answers(rows, begun=lambda: begun.append(1)))) == len(rows)
    assert len(begun) == -(-len(rows) // SIZE)
    assert list(decoder.answers([])) == []


def rotated(kind: str, **more: Any) -> Callable[[], Any]:
    scaling = {"rope_type": kind, "rope_theta": 10_000.0, **more}
    if kind == "longrope":
        return lambda: Phi3Config(**TEXT, rope_parameters=scaling, original_max_position_embeddings=64)
    return lambda: LlamaConfig(**TEXT, rope_parameters=scaling)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (rotated("dynamic", factor=2.0), "dynamic"),
        (rotated("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8), "longrope"),
        (lambda: GPT2Config(**IDS, n_embd=64, n_layer=1, n_head=4, n_positions=60), "its context has 60"),
        (rotated("linear", factor=2.0), None),
        (lambda: GPT2Config(**IDS, n_embd=64, n_layer=1, n_head=4, n_positions=128), None),
    ],
)
def test_what_a_new_cache_would_change_is_decoded_whole(config: Callable[[], Any], why: str | None) -> None:
    model = AutoModelForCausalLM.from_config(config())
    notes: dict[str, str] = {}
    end = GenerationConfig(max_new_tokens=LIMIT, do_sample=False, eos_token_id=[2], pad_token_id=0)
    decoder = Decoder(model=model.eval(), config=end, size=SIZE)
    assert len(list(decoder.answers(asked(), note=notes.__setitem__))) == len(asked())
    assert not notes if why is None else why in notes["batches"]
