"""Model folders of published shapes: config.json and safetensors headers as on the hub, holes in place of weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.recipes.folders import TEMPLATE, llama_shapes, write_safetensors

QWEN3_POSITIONS, LLAMA3_POSITIONS = 40960, 8192


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder as its config.json gives it; a mixture has experts, each as wide as `intermediate`.

    Attributes:
        model: Its name on the hub.
        type: model_type.
        tied: Input embeddings serve as output layer.
        experts: Of a layer; 0 for a dense model.
        routed: Experts that a token is routed to.
    """

    model: str
    type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    experts: int = 0
    routed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        qwen = self.type.startswith("qwen3")
        mixture = {
            "num_experts": self.experts,
            "num_experts_per_tok": self.routed,
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        architecture = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM"}
        return {
            "architectures": [architecture[self.type]],
            "model_type": self.type,
            "hidden_size": self.hidden,
            "intermediate_size": 3 * self.hidden if self.experts else self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": QWEN3_POSITIONS if qwen else LLAMA3_POSITIONS,
            **(mixture if self.experts else {}),
        }

    @property
    def tensors(self) -> dict[str, list[int]]:
        """Names and shapes [out, in] of the checkpoint."""
        sizes = {"hidden": self.hidden, "intermediate": self.intermediate, "layers": self.layers}
        shapes = llama_shapes(**sizes, kv=self.kv_heads * self.head_dim, vocabulary=self.vocabulary)
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            shapes[f"{layer}.post_attention_layernorm.weight"] = [self.hidden]
            shapes[f"{layer}.self_attn.q_proj.weight"] = [self.heads * self.head_dim, self.hidden]
            shapes[f"{layer}.self_attn.o_proj.weight"] = [self.hidden, self.heads * self.head_dim]
            if self.type.startswith("qwen3"):
                shapes |= {f"{layer}.self_attn.{name}_norm.weight": [self.head_dim] for name in "qk"}
            if self.experts:
                dense = {name: shapes.pop(f"{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down")}
                shapes[f"{layer}.mlp.gate.weight"] = [self.experts, self.hidden]
                for expert in range(self.experts):
                    shapes |= {f"{layer}.mlp.experts.{expert}.{name}_proj.weight": size for name, size in dense.items()}
        return shapes if self.tied else shapes | {"lm_head.weight": [self.vocabulary, self.hidden]}


def _qwen3(name: str, *, kv_heads: int = 8, **sizes: Any) -> Shape:
    kind = "qwen3_moe" if "experts" in sizes else "qwen3"
    return Shape(model=f"Qwen/{name}", type=kind, kv_heads=kv_heads, head_dim=128, vocabulary=151936, **sizes)


SHAPES = {
    "0.6B": _qwen3("Qwen3-0.6B", hidden=1024, intermediate=3072, layers=28, heads=16, tied=True),
    "4B": _qwen3("Qwen3-4B", hidden=2560, intermediate=9728, layers=36, heads=32, tied=True),
    "8B": _qwen3("Qwen3-8B", hidden=4096, intermediate=12288, layers=36, heads=32),
    "14B": _qwen3("Qwen3-14B", hidden=5120, intermediate=17408, layers=40, heads=40),
    "32B": _qwen3("Qwen3-32B", hidden=5120, intermediate=25600, layers=64, heads=64),
    "70B": Shape(
        model="meta-llama/Meta-Llama-3-70B-Instruct", type="llama", hidden=8192, intermediate=28672, layers=80,
        heads=64, kv_heads=8, head_dim=128, vocabulary=128256,
    ),
    "30B-A3B": _qwen3(
        "Qwen3-30B-A3B", hidden=2048, intermediate=768, layers=48, heads=32, kv_heads=4, experts=128, routed=8
    ),
    "Llama-8B": Shape(
        model="meta-llama/Llama-3.1-8B-Instruct", type="llama", hidden=4096, intermediate=14336, layers=32, heads=32,
        kv_heads=8, head_dim=128, vocabulary=128256,
    ),
}  # fmt: skip


def write_shape(folder: Path, shape: Shape) -> Path:
    """Its folder: config.json, model.safetensors without weights, a tokenizer's file and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config))
    write_safetensors(folder / "model.safetensors", shape.tensors)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder
