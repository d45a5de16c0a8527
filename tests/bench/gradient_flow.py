"""Does a gradient reach LoRA through quantized layers? One batch, backward through each format and kernel.

The same adapter stands on every model; the gradient of its B matrices in the first decoder layer has passed all
quantized layers above. It is compared with that on the bf16 model by their cosine: quantization changes the weights a
little, and so the gradient. A kernel without a backward does not fail, it hands on what passes beside it: `bf16,
stopped` shows what that looks like, the bf16 model with nothing coming back through the linear layers above the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORMATS = ("rtn-w4-g128", "gptq-w4-g128", "awq-w4-g128")
ROWS = 16
STOPPED = "bf16, stopped"
ENOUGH = 0.8


class Flow(NamedTuple):
    """What became of one format: the kernel that was used, and the cosine, or what stopped it."""

    slug: str
    kernel: str
    cosine: float | None
    trouble: str | None

    @property
    def flows(self) -> bool:
        """The gradient is that of slightly other weights."""
        return self.cosine is not None and self.cosine > ENOUGH


def flows_of(merged: Path, quantized: Mapping[str, Path], dataset: Path) -> list[Flow]:
    """Every format with the kernel that transformers picks on a CPU, and GPTQ and AWQ files with plain torch, too.

    Args:
        merged: The bf16 model; also loaded in NF4, as QLoRA trains it.
        quantized: Folder of each format, made from it.
        dataset: The run's rows.
    """
    import torch

    from tasks.jobs.loading.kernels import kernel_of
    from tasks.jobs.loading.load import load_arm, load_bf16, load_nf4
    from tasks.jobs.measuring.teacher_forcing import read_rows

    torch.set_num_threads(1)
    rows = [row.ids for row in read_rows(dataset, "dev")[:ROWS]]
    loaders: list[tuple[str, Any]] = [
        (STOPPED, lambda: _stopped(load_bf16(merged, device="cpu"))),
        ("nf4", lambda: load_nf4(merged, device="cpu")),
    ]
    for slug, folder in quantized.items():
        loaders.append((slug, lambda folder=folder: load_arm("quantized", folder, device="cpu")))
        loaders.append((slug, lambda folder=folder, slug=slug: _plain(slug, folder)))
    wanted = _gradient(load_bf16(merged, device="cpu"), rows)
    found: list[Flow] = []
    for slug, loaded in loaders:
        model = loaded()
        kernel = kernel_of(model)
        try:
            cosine = torch.nn.functional.cosine_similarity(_gradient(model, rows), wanted, dim=0).item()
            found.append(Flow(slug, kernel, cosine, None))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            found.append(Flow(slug, kernel, None, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
        print(found[-1], flush=True)
    return found


def _stopped(model: Any) -> Any:
    """No gradient comes back through the linear layers above the first decoder layer."""
    from torch import nn

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in name and ".layers.0." not in name:
            layer.forward = lambda x, layer=layer: nn.functional.linear(x.detach(), layer.weight)
    return model


def _plain(slug: str, folder: Path) -> Any:
    """The same files with the kernel that is written in plain torch."""
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    config: Any = AwqConfig(backend="torch_awq") if slug.startswith("awq") else GPTQConfig(bits=4, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config
    )


def _gradient(model: Any, rows: list[list[int]]) -> Any:
    """[n] gradients of the first decoder layer's B matrices, end to end; the same A for every model."""
    import torch
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    adapted.train()
    draw = torch.Generator().manual_seed(0)
    parameters = dict(sorted(adapted.named_parameters()))
    with torch.no_grad():
        for name, weight in parameters.items():
            if "lora_A" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)
    for ids in rows:
        tokens = torch.tensor([ids])
        (adapted(input_ids=tokens, labels=tokens).loss / len(rows)).backward()
    first = [one.grad for name, one in parameters.items() if ".layers.0." in name and "lora_B" in name]
    if not first or any(one is None for one in first):
        raise RuntimeError("no gradient arrived at the first layer")
    return torch.cat([one.float().flatten() for one in first])


def told(flows: list[Flow]) -> str:
    """One line for the page."""
    parts = [
        f"{one.slug} ({one.kernel}) {f'{one.cosine:.3f}' if one.cosine is not None else one.trouble}" for one in flows
    ]
    return f"cosine to bf16's gradient in the first layer: {'; '.join(parts)}"


def verdict(flows: list[Flow]) -> str:
    """Which formats a gradient passes, with the right kernel."""
    others = list(dict.fromkeys(one.slug for one in flows if one.slug not in (STOPPED, "nf4")))
    through = [slug for slug in others if any(one.flows for one in flows if one.slug == slug)]
    lost = [f"{one.slug} ({one.kernel})" for one in flows if one.slug in through and not one.flows]
    if not others:
        return "not measured"
    text = f"a right gradient passes {len(through)} of {len(others)} other formats"
    if through:
        text += f" ({', '.join(through)}), so the claim is wrong"
    return f"{text}; it is lost, without an error, in {', '.join(lost)}" if lost else text
