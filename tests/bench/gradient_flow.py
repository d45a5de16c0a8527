"""Does a gradient reach LoRA through quantized layers? One batch, backward through each format and kernel.

A gradient is right if the loss changes along it as it says: the slope of the loss between two small steps to either side
of the start, over the slope that the gradient predicts, its own square. 1 is right. A kernel without a backward does not
fail: it hands on what passes beside it, and the ratio tells. The adapter's B matrices in the first decoder layer are
moved: their gradient has passed every quantized layer above.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = ("rtn-w4-g128", "gptq-w4-g128", "awq-w4-g128")
ROWS = 16
CHANGE = 0.02  # nats that one step is to change the loss by: far above bf16's rounding, small against the curvature


class Flow(NamedTuple):
    """What became of one format: the kernel that was used, and the ratio of slopes, or what stopped it."""

    slug: str
    kernel: str
    ratio: float | None
    trouble: str | None

    @property
    def flows(self) -> bool:
        """The gradient is right within what two steps and bf16 sums can tell."""
        return self.ratio is not None and 0.8 < self.ratio < 1.25


def flows_of(merged: Path, quantized: Mapping[str, Path], dataset: Path) -> list[Flow]:
    """Every format with the kernel that transformers picks on a CPU, and GPTQ and AWQ files with plain torch, too.

    Args:
        merged: The bf16 model; also loaded in NF4, as QLoRA trains it.
        quantized: Folder of each format, made from it.
        dataset: The run's rows.
    """
    import torch

    from tasks.jobs.backends.load import kernel_of, load_arm, load_bf16, load_nf4
    from tasks.jobs.scoring import read_rows

    torch.set_num_threads(1)
    rows = [row.ids for row in read_rows(dataset, "dev")[:ROWS]]
    loaders: list[tuple[str, Any]] = [
        ("bf16", lambda: load_bf16(merged, device="cpu")),
        ("nf4", lambda: load_nf4(merged, device="cpu")),
    ]
    for slug, folder in quantized.items():
        loaders.append((slug, lambda folder=folder: load_arm("quantized", folder, device="cpu")))
        loaders.append((slug, lambda folder=folder, slug=slug: _plain(slug, folder)))
    found: list[Flow] = []
    for slug, loaded in loaders:
        model = loaded()
        kernel = kernel_of(model)
        try:
            found.append(Flow(slug, kernel, _ratio(model, rows), None))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            found.append(Flow(slug, kernel, None, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
        print(found[-1], flush=True)
    return found


def _plain(slug: str, folder: Path) -> Any:
    """The same files with the kernel that is written in plain torch."""
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    config: Any = AwqConfig(backend="awq_torch") if slug.startswith("awq") else GPTQConfig(bits=4, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
    )


def _ratio(model: Any, rows: list[list[int]]) -> float:
    """Measured slope over predicted slope."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    adapted.train()
    loss = _loss(adapted, rows)
    loss.backward()
    moved = [one for name, one in adapted.named_parameters() if "layers.0." in name and "lora_B" in name]
    gradients = [one.grad for one in moved]
    if any(one is None for one in gradients):
        raise RuntimeError("no gradient arrived at the first layer")
    square = sum((one.double() ** 2).sum().item() for one in gradients)
    step = CHANGE / square
    ends: list[float] = []
    with torch.no_grad():
        for sign in (1, -1):
            for weight, gradient in zip(moved, gradients, strict=True):
                weight.copy_(sign * step * gradient)  # B starts at 0
            ends.append(_loss(adapted, rows).item())
    return (ends[0] - ends[1]) / (2 * step) / square


def _loss(model: Any, rows: list[list[int]]) -> Any:
    """Mean loss a row, each on its own: no padding."""
    import torch

    total: Any = 0.0
    for ids in rows:
        tokens = torch.tensor([ids])
        total = total + model(input_ids=tokens, labels=tokens).loss
    return total / len(rows)


def told(flows: list[Flow]) -> str:
    """One line for the page."""
    parts = [
        f"{one.slug} ({one.kernel}): {f'{one.ratio:.2f}' if one.ratio is not None else one.trouble}" for one in flows
    ]
    return f"slope of the loss along the gradient, measured over predicted: {'; '.join(parts)}"


def verdict(flows: list[Flow]) -> str:
    """Which formats a gradient passes, with the right kernel."""
    others = list(dict.fromkeys(one.slug for one in flows if one.slug not in ("bf16", "nf4")))
    through = [slug for slug in others if any(one.flows for one in flows if one.slug == slug)]
    lost = [f"{one.slug} ({one.kernel})" for one in flows if one.slug in through and not one.flows]
    if not others:
        return "not measured"
    text = f"a right gradient passes {len(through)} of {len(others)} other formats"
    if through:
        text += f" ({', '.join(through)}), so the claim is wrong"
    return f"{text}; it is lost, without an error, in {', '.join(lost)}" if lost else text
