"""Products of bf16 matrices by way of fp32: rounded once, also in gradients; other types are left alone."""

from __future__ import annotations

import subprocess
import sys

from tasks.runtime.process.launch import CHECKOUT

# In a process of its own: the kernels stay for the rest of a process, and on most machines the tests need none.
CODE = """
import torch
from tasks.jobs.loading.bf16 import use_fp32_products

torch.manual_seed(0)
inputs, weight = torch.randn(40, 96), torch.randn(24, 96)
bias, batch = torch.randn(24), torch.randn(3, 40, 96)
before = [torch.nn.functional.linear(inputs, weight, bias), batch @ weight.T, inputs.double() @ weight.double().T]
use_fp32_products()
after = [torch.nn.functional.linear(inputs, weight, bias), batch @ weight.T, inputs.double() @ weight.double().T]
assert all(torch.equal(old, new) for old, new in zip(before, after))
assert torch.equal(torch.ones(2, 2, dtype=torch.int64) @ torch.ones(2, 2, dtype=torch.int64), torch.full((2, 2), 2))


def close(got, exact):  # half a unit in the last place: 8 bits of significand; and what summing 96 terms adds
    assert got.dtype is torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


narrow = [tensor.bfloat16().requires_grad_() for tensor in (inputs, weight, bias)]
wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
for tensors in (narrow, wide):
    torch.nn.functional.linear(*tensors).backward(torch.ones(40, 24, dtype=tensors[0].dtype))
close(torch.nn.functional.linear(*narrow), torch.nn.functional.linear(*wide))
for got, exact in zip(narrow[:2], wide[:2]):
    close(got.grad, exact.grad)
halves = batch.bfloat16()
close(torch.bmm(halves, halves.mT), torch.bmm(halves.double(), halves.double().mT))
print("done")
"""


def test_products_are_rounded_once_and_other_types_are_untouched():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stdout + done.stderr
