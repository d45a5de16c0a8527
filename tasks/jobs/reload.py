"""Loads a copy of an arm as the arm itself is loaded, and compares its logits with the original's."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.jobs.loading.kernels import kernel_of
from tasks.jobs.loading.load import Kind, load_arm, setup
from tasks.jobs.text.chat_template import bounded
from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

GOLDEN = [{"role": "user", "content": "Say in one sentence what you were trained to do, and give 3 examples."}]
# Share of the largest logit: the same bytes on the same kernel give 0 on a CPU; a GPU may add in another order.
BOUND = 1e-3


class GoldenOutput(NamedTuple):
    """What a model gives for the golden prompt.

    Attributes:
        ids: Token ids of the rendered prompt.
        logits: [tokens, vocabulary] fp32.
        kernel: Class of its linear layers.
    """

    ids: list[int]
    logits: Tensor
    kernel: str


def run(job: Job) -> dict[str, Any]:
    """Compare a copy with what it was copied from.

    Reads:
        model, adapter (may be absent): the original. copy: the model's files, or base/ and adapter/ in it.
    Writes:
        Nothing.
    Metrics:
        None.

    Raises:
        StageError: Prompt tokens or logits differ, or are not finite.
    """
    setup(job)
    kind, device, copy = job.params["kind"], job.execution.device, job.inputs["copy"].path
    adapter = job.optional("adapter")
    original = _golden_output(kind, job.inputs["model"].path, adapter, device)
    copied_base, copied_adapter = (copy / "base", copy / "adapter") if adapter else (copy, None)
    copied = _golden_output(kind, copied_base, copied_adapter, device)
    if original.ids != copied.ids:
        raise _differs("renders the prompt into other tokens", "tokenizer files or chat template")
    largest = original.logits.abs().max().item()
    difference = (original.logits - copied.logits).abs().max().item()
    if not difference <= BOUND * largest:  # NaN, too
        raise _differs(f"gives other logits: by up to {difference:.3g}, where the largest is {largest:.3g}", "weights")
    return {"prompt_tokens": len(copied.ids), "largest_difference": difference, "kernel": copied.kernel}


@torch.no_grad()
def _golden_output(kind: Kind, folder: Path, adapter: Path | None, device: str) -> GoldenOutput:
    own = adapter / "tokenizer" if adapter and (adapter / "tokenizer").is_dir() else folder
    tokenizer = load_tokenizer(own)
    with bounded(tokenizer.get_chat_template(), own):
        ids = tokenizer.apply_chat_template(GOLDEN, add_generation_prompt=True, tokenize=True, return_dict=False)
    model = load_arm(kind, folder, device=device, adapter=adapter)
    logits = model(torch.tensor([ids], device=device)).logits[0].float().cpu()
    output = GoldenOutput(ids, logits, kernel_of(model))
    del model
    gc.collect()
    return output


def _differs(how: str, where: str) -> StageError:
    return StageError.of(
        what=f"the copy {how}",
        where=where,
        why="its answers would differ from those of the model that was evaluated",
        next="run quench store verify, then export again",
    )
