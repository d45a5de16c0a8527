"""What lies where while GPTQModel works changes no byte of what it writes, and AWQ keeps equal inputs once."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.jobs.backends import gptqmodel, unpadded
from tasks.jobs.backends.awq_inputs import inputs_kept_once, once
from tasks.jobs.loading.environment import tame_gptqmodel
from tests.jobs.architectures import write_architecture
from tests.jobs.build import make_request
from tests.jobs.quantized import params

ROWS = [torch.randint(4, 240, (96,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_architecture(tmp_path_factory.mktemp("places") / "base", "llama")


def digests(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), folder / "config.json", folder / "quantize_config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("slug", ["gptq-w4-g32", "awq-w4-g32"])
def test_layers_read_one_by_one_give_the_same_files(slug: str, base: Path, tmp_path: Path) -> None:
    """The places that are asked for on CUDA, on a CPU."""
    whole, apart = tmp_path / "whole", tmp_path / "apart"
    gptqmodel.quantize(make_request(base, whole, rows=ROWS, params=params(slug)))
    tame_gptqmodel()
    from gptqmodel import BACKEND, GPTQModel

    with contextlib.chdir(tmp_path):
        model: Any = GPTQModel.load(str(base), gptqmodel._config(params(slug), device="cuda"), device="cpu")
        assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}
        backend = BACKEND.AWQ_TORCH if slug.startswith("awq") else BACKEND.AUTO
        model.quantize(unpadded(ROWS), batch_size=1, backend=backend)
        assert len(list((tmp_path / gptqmodel.OFFLOAD).glob("model.layers.*"))) == 14
        model.save(str(apart))
    gptqmodel.forget_where(apart)
    assert digests(apart) == digests(whole)


@contextlib.contextmanager
def largest_cache() -> Iterator[Callable[[], int]]:
    """Most numbers that AWQ keeps of the inputs of a layer."""
    from gptqmodel.looper.awq_processor import AWQProcessor

    search, seen = AWQProcessor._search_best_scale, [0]

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        kept = {one.data_ptr(): one.numel() for task in self.tasks.values() for one in task["inputs"]}
        seen[0] = max(seen[0], sum(kept.values()))
        return search(self, *args, **options)

    AWQProcessor._search_best_scale = watched
    try:
        yield lambda: seen[0]
    finally:
        AWQProcessor._search_best_scale = search


def test_equal_inputs_are_kept_once_and_nothing_else_changes(base: Path, tmp_path: Path) -> None:
    tame_gptqmodel()
    from gptqmodel import BACKEND, GPTQModel

    kept: dict[str, int] = {}
    for name, way in (("each", contextlib.nullcontext), ("once", inputs_kept_once)):
        with contextlib.chdir(tmp_path), way(), largest_cache() as numbers:
            config = gptqmodel._config(params("awq-w4-g32"), device="cpu")
            model: Any = GPTQModel.load(str(base), config, device="cpu")
            model.quantize(unpadded(ROWS), batch_size=1, backend=BACKEND.AWQ_TORCH)
            model.save(str(tmp_path / name))
            kept[name] = numbers()
    tokens = sum(map(len, ROWS))
    assert kept == {"each": tokens * (6 * 128 + 192), "once": tokens * (3 * 128 + 192)}
    assert digests(tmp_path / "each") == digests(tmp_path / "once")


def test_a_shared_input_is_divided_once_and_a_layer_that_is_not_scaled_has_its_own() -> None:
    shared, own = torch.ones(4), torch.ones(2)
    inputs = {"q": shared, "k": shared, "gate": shared, "o": own}
    divided = once(inputs, ("q", "k"))
    assert list(divided) == ["q"] and divided["q"] is shared
    divided["q"].div_(2)
    assert inputs["k"].tolist() == [0.5] * 4 and inputs["gate"].tolist() == [1.0] * 4 and inputs["o"] is own
