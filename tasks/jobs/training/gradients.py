"""Are gradients the same before and after an evaluation? The check that comes before the first training step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel

from tasks.runtime.process.errors import StageError


class GradientComparison(NamedTuple):
    """Cosine of two gradients, and the second's norm over the first's."""

    cosine: float
    norm_ratio: float

    @property
    def sound(self) -> bool:
        """Equal but for the order of summation: 0.999 and 1 %; the bitsandbytes fault gives 0.07-0.7 and 0.005."""
        return self.cosine > 0.999 and abs(self.norm_ratio - 1) < 0.01


def check_gradients(model: PeftModel, batch: dict[str, Any]) -> GradientComparison:
    """Compare the gradient of a batch before and after an evaluation forward. Leaves weights and RNG as they were.

    Args:
        model: With trainable adapter, and the fused output layer that TRL's trainer gives it.
        batch: What the collator makes of a few rows: input_ids, labels and attention_mask, each [rows, tokens], or
            position_ids and the bounds of packed rows.

    Raises:
        StageError: They differ, so training would follow a wrong gradient from the first evaluation on.
    """
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    batch["use_cache"] = False  # with a cache, transformers makes no mask between packed rows

    def gradient() -> torch.Tensor:
        model.train()
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(0)  # the same dropout twice
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                loss = model(**batch, fused_lm_head=True).loss  # as in training: without all logits in memory at once
            loss.backward()
        flat = torch.cat([p.grad.detach().double().flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return flat

    before = gradient()
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16):
        model(**batch, fused_lm_head=True)
    after = gradient()
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=0).item()
    comparison = GradientComparison(cosine=cosine, norm_ratio=(after.norm() / before.norm()).item())
    if not comparison.sound:
        raise StageError.of(
            what="the gradient of one batch changes after an evaluation forward",
            where=f"before step 1: cosine {comparison.cosine:.3f}, norm x {comparison.norm_ratio:.3f}",
            why="the 4-bit layers now run a kernel without a backward, so training would go wrong unnoticed "
            "(bitsandbytes 0.50.2 does this on CPUs with AVX512-BF16 unless it is told not to)",
            next="install the bitsandbytes of infra/locks, or train on a GPU (run.device: cuda)",
        )
    return comparison
