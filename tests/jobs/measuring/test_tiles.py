"""Logits tile by tile are those of the whole batch, whatever stands behind the decoder, and take a tile's memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GraniteConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from flows.plan import sizes
from tasks.jobs.loading.load import load_arm
from tasks.jobs.measuring import teacher_forcing, tiles
from tasks.jobs.measuring.decoding import greedy_answers
from tasks.jobs.measuring.teacher_forcing import forced
from tasks.jobs.measuring.tiles import computes_in_tiles, last_only, read_in_rows
from tests.jobs.architectures import SHAPE, train_adapter, write_architecture
from tests.jobs.measuring.test_kv_cache import END, rows
from tests.jobs.quantized import make

VOCABULARY = 310
TILE = 10  # tokens: each of three rows takes several, and their ends fall into others' tiles
IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3}
TEXT: dict[str, Any] = SHAPE | IDS | {"intermediate_size": 64, "hidden_size": 64, "head_dim": 16}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURE: dict[str, Any] = VISION | {"image_size": 28, "patch_size": 14}
MAMBA: dict[str, Any] = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}


class Bypassing(LlamaForCausalLM):
    """A model that runs its decoder by no call that could be seen."""

    def forward(self, input_ids: Any, attention_mask: Any, **more: Any) -> CausalLMOutputWithPast:
        hidden = type(self.model).forward(self.model, input_ids, attention_mask=attention_mask, use_cache=False)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden.last_hidden_state))


def written_here(config: Any) -> Callable[[], PreTrainedModel]:
    return lambda: AutoModelForCausalLM.from_config(config)


# What stands behind the decoder, and where the decoder is.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "tied": written_here(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "soft cap": written_here(Gemma2Config(**TEXT, final_logit_softcapping=5.0)),
    "scaled": written_here(CohereConfig(**TEXT, logit_scale=0.3)),
    "divided": written_here(GraniteConfig(**TEXT, logits_scaling=3.0)),
    "multiplied": written_here(FalconH1Config(**TEXT, **MAMBA, lm_head_multiplier=0.5)),
    "in fp32, a backbone": written_here(MambaConfig(**IDS, hidden_size=64, state_size=8, num_hidden_layers=2)),
    "a transformer": written_here(GPT2Config(**IDS, n_embd=64, n_layer=2, n_head=4, n_positions=128)),
    "a decoder in a decoder": written_here(
        OPTConfig(**TEXT, ffn_dim=64, word_embed_proj_dim=64, do_layer_norm_before=True)
    ),
    "vision": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=PICTURE, image_token_id=VOCABULARY - 1)
    ),
    "vision beside a whole language model": lambda: Llama4ForConditionalGeneration(
        Llama4Config(
            text_config=TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 64},
            vision_config=PICTURE | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            image_token_index=VOCABULARY - 1,
        )
    ),
}


def whole(model: Any) -> list[Tensor]:
    """[T - 1, vocabulary] of every row, by one call of the model."""
    longest = max(len(row.ids) for row in rows())
    ids = torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows()])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows()])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [line[: len(row.ids) - 1] for line, row in zip(logits, rows(), strict=True)]


def in_tiles(model: Any) -> list[Tensor]:
    return [torch.cat(parts) for parts in forced(model, rows(), lambda part: part.every.clone())]


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_BYTES", TILE * 2 * VOCABULARY)


def assert_alike(expected: list[Tensor], logits: list[Tensor]) -> None:
    """Sums in fp32 may end in other last bits where a product has another shape, which turns few roundings to bf16.

    0 of 30,600 logits were other ones on a CPU without AVX-512; 1 % and one step of bf16 (2^-7) is the bound elsewhere.
    """
    for one, other in zip(expected, logits, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one != other).double().mean() < 0.01
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_tiles_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16().eval()
    expected = whole(model)
    assert_alike(expected, in_tiles(model))  # one tile
    small_tiles(monkeypatch)
    assert_alike(expected, in_tiles(model))
    assert computes_in_tiles(model)
    assert all("forward" not in part.__dict__ for part in model.modules())
    assert_alike(expected, whole(model))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_an_adapter_on_nf4_and_on_the_output_layer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_architecture(tmp_path / "base", name, tied=False)
    adapter = train_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj", "lm_head"])
    model = load_arm("nf4", base, adapter=adapter, device="cpu")
    small_tiles(monkeypatch)
    assert_alike(whole(model), in_tiles(model))
    assert computes_in_tiles(model) and last_only(model) == {"logits_to_keep": 1}


def test_a_gptq_checkpoint(calibset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("gptq-w4-g32", write_architecture(tmp_path / "base", "llama"), tmp_path / "out", calibset=calibset)
    model = load_arm("quantized", tmp_path / "out", device="cpu")
    small_tiles(monkeypatch)
    assert_alike(whole(model), in_tiles(model))


def test_a_model_without_a_decoder_to_run_alone_has_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Bypassing(LlamaConfig(**TEXT)).bfloat16().eval()
    small_tiles(monkeypatch)
    assert not computes_in_tiles(model) and last_only(model) == {}
    assert_alike(whole(model), in_tiles(model))


def test_tiles_hold_a_tile_and_the_output_layer_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile is small, a failure in the middle leaves the decoder its own forward, and one put there comes back."""
    torch.manual_seed(0)
    model = MODELS["tied"]().bfloat16().eval()
    small_tiles(monkeypatch)
    sizes = [len(part) for parts in forced(model, rows(), lambda part: part.every) for part in parts]
    assert sum(sizes) == sum(len(row.ids) - 1 for row in rows()) and max(sizes) <= TILE

    def fail(_: Any) -> None:
        raise KeyError("in the middle")

    own = type(model.model).forward.__get__(model.model)
    model.model.forward = own
    with pytest.raises(KeyError):
        forced(model, rows(), fail)
    assert model.model.__dict__.pop("forward") is own


@pytest.mark.parametrize("wrapped", [False, True])
def test_answers_take_logits_of_one_position(wrapped: bool, tmp_path: Path) -> None:
    """generate() asks for no others, through PEFT's wrapper, too; what the output layer reads is in one piece."""
    base = write_architecture(tmp_path / "base", "llama")
    adapter = train_adapter(base, tmp_path / "adapter") if wrapped else None
    model: Any = load_arm("nf4" if wrapped else "bf16", base, adapter=adapter, device="cpu")
    read_in_rows(model)
    inputs: list[Tensor] = []
    layer = model.get_base_model().lm_head if wrapped else model.lm_head
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    answers = greedy_answers(model, rows(), END)
    assert len(inputs) >= max(len(answer.tokens) for answer in answers) > 1
    assert {one.shape for one in inputs} == {(len(rows()), 1, SHAPE["hidden_size"])}
    assert all(one.is_contiguous() for one in inputs)


def test_the_plan_counts_what_the_job_holds() -> None:
    assert (sizes.EVAL_TILE, sizes.EVAL_PART) == (tiles.TILE_BYTES, teacher_forcing.PART_BYTES)


PEAK = """
import sys, torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig
from tasks.jobs.evaluate import divergence
from tasks.jobs.loading.bf16 import lacks_bf16, use_fp32_products
from tasks.jobs.measuring.decoding import greedy_answers
from tasks.jobs.measuring.teacher_forcing import TokenRow, forced
from tasks.jobs.measuring.tiles import read_in_rows

def kib(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

if lacks_bf16():
    use_fp32_products()
vocabulary, rows = int(sys.argv[1]), 4
config = Gemma2Config(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32,
                      num_key_value_heads=1, vocab_size=vocabulary, tie_word_embeddings=True)
model = Gemma2ForCausalLM(config).bfloat16().eval().requires_grad_(False)  # as PEFT leaves it
read_in_rows(model)
ids = list(range(4, 260))
batch = [TokenRow(row=str(n), group="", split="test", ids=ids, counted=[False] * 240 + [True] * 16, prompt_ids=ids[:99])
         for n in range(rows)]

def keep(part):
    with torch.inference_mode():
        kl = [divergence(part.every[few], part.every[few]) for few in part.counted.split(part.part)]
    assert all((few == 0).all() for few in kl)
    return part.losses()

before = kib("VmRSS")
assert sum(len(part) for parts in forced(model, batch, keep) for part in parts) == rows * 255
greedy_answers(model, batch, GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=[2], pad_token_id=0))
print((kib("VmHWM") - before) // 1024)
"""


def test_peak_memory_hardly_depends_on_the_vocabulary() -> None:
    """4 rows of 256 tokens, a vocabulary of 200,000: all logits are 390 MiB in bf16, and two to three times that in the
    product and the soft cap; 4 copies of the output layer in fp32 are 195.

    In tiles: 128 MiB of bf16 twice for the soft cap, or with 256 in fp32 where a CPU lacks AVX-512; 49 of the output
    layer; copies in fp64.
    """
    grown = {}
    for vocabulary in (4_096, 200_000):
        done = subprocess.run([sys.executable, "-c", PEAK, str(vocabulary)], capture_output=True, text=True, check=True)
        grown[vocabulary] = int(done.stdout)
    assert grown[200_000] - grown[4_096] < 600, grown  # MiB
