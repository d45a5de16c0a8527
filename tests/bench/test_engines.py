"""The table of engines against the source of the installed vLLM: no cell differs, and a changed source is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.engine_source import EXPERTS, KERNELS, MARLIN_UTILS, QUANTIZATION, Source
from tests.bench.engines import GPTQ, WNA16, differences, installed

VOCABULARY = "model_executor/layers/vocab_parallel_embedding.py"
pytestmark = pytest.mark.slow  # it needs the environment, not time: 3 s


@pytest.fixture(scope="module")
def package() -> Path:
    found = installed()
    if found is None:
        pytest.skip("there is no .envs/vllm: run make env-vllm")
    return found


class Changed(Source):
    """The same source with one text in one file replaced."""

    def __init__(self, package: Path, path: str, change: tuple[str, str]) -> None:
        super().__init__(package)
        self._path, self._change = path, change

    def text(self, path: str) -> str:
        text = super().text(path)
        if path != self._path:
            return text
        assert self._change[0] in text
        return text.replace(*self._change)


def test_table_and_source_differ_in_no_cell(package: Path):
    assert [str(difference) for difference in differences(Source(package))] == []


@pytest.mark.parametrize(
    ("path", "before", "after", "cell"),
    [
        (GPTQ, "(8, True): scalar_types.uint8b128,", "", "gptq, 8 bits without zero points, groups of 64, GPU 8.0"),
        (
            f"{QUANTIZATION}/utils/gptq_utils.py",
            "if desc_act and group_size == -1:",
            "if desc_act:",
            "activation order",
        ),
        (WNA16, "    3: scalar_types.uint3b4,\n", "", "compressed-tensors, 3 bits without zero points, per channel"),
        (WNA16, "return 75", "return 80", "compressed-tensors, 4 bits with zero points, groups of 32, GPU 7.5"),
        (MARLIN_UTILS, "[-1, 32, 64, 128]", "[-1, 64, 128]", "gptq, 4 bits without zero points, groups of 32, GPU 8.0"),
        (MARLIN_UTILS, "round_up(size_n, 64)", "round_up(size_n, 32)", "Marlin pads"),
        (f"{KERNELS}/mixed_precision/cpu.py", "[1] % 32", "[1] % 16", "a layer of 32 x 16 on a CPU"),
        (
            f"{KERNELS}/mixed_precision/cpu.py",
            ".uint4, ",
            ".uint8b128, ",
            "zero points, per channel, CPU",
        ),
        (f"{KERNELS}/mixed_precision/humming.py", "is_cuda()", "is_rocm()", "2 bits with zero points"),
        (
            f"{EXPERTS}/marlin_moe.py",
            "kInt4StaticAsym,",
            "",
            "4 bits with zero points, per channel, GPU 8.0, experts",
        ),
        ("config/model.py", "% tensor_parallel_size != 0", "% tensor_parallel_size != 1", "shares of ranks"),
        (VOCABULARY, "PADDING_SIZE = 64", "PADDING_SIZE = 128", "shares of ranks"),
        (MARLIN_UTILS, "is_channelwise and is_row", "is_row", "shares of ranks"),
    ],
)
def test_what_changes_in_the_source_is_noticed(package: Path, path: str, before: str, after: str, cell: str):
    unequal = [str(difference) for difference in differences(Changed(package, path, (before, after)))]
    assert any(cell in difference for difference in unequal), unequal
