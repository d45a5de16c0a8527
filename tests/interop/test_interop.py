"""One reader's weights are another's, bit for bit, and a file with one wrong number is noticed.

What needs the archived packages is slow; `make test-all` installs their environments.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.schemes.limits import ARCHIVED
from recipes.schemes.scheme import Backend, Scheme
from recipes.schemes.slugs import by_backend, parse_scheme
from tasks.jobs.loading.load import load_arm, load_bf16
from tasks.quantize import ENVIRONMENTS, alone
from tasks.runtime.process.environments import environment_problem
from tests.conftest import World
from tests.interop.agreement import compare, exllamav2, off_definition, off_layout, vllm_awq, vllm_gptq
from tests.interop.exchange import READS, form, read_by, shifted, write_by, write_rows
from tests.jobs.architectures import write_architecture
from tests.jobs.quantized import make, mean_kl, write_calibset
from tests.tiny import write_base

DAMAGES = ("zero point", "group")


def archived(slug: str, backend: Backend) -> Scheme:
    return by_backend(parse_scheme(slug), backend)


def needs(*environments: str) -> None:
    problems = [problem for name in environments if (problem := environment_problem(name))]
    if problems:
        pytest.skip("\n".join(map(str, problems)))


def write_token_rows(path: Path) -> Path:
    rows = torch.randint(4, 300, (4, 40), generator=torch.Generator().manual_seed(3)).tolist()
    pq.write_table(pa.table({"input_ids": rows}), path)
    return path


def test_transformers_reads_what_the_files_mean_and_a_shift_is_noticed(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    make("rtn-w4-g32", write_base(tmp_path / "base"), whole, calibset=tmp_path)
    models = {"whole": whole, **{what: shifted(whole, tmp_path / what, what=what) for what in DAMAGES}}
    read_by("transformers", models, write_token_rows(tmp_path / "rows.parquet"), tmp_path / "read")
    read = tmp_path / "read"
    assert not off_definition(whole, read / "whole" / "weights.safetensors")
    assert compare(read / "whole", read / "whole").holds
    for what in DAMAGES:
        agreement = compare(read / "whole", read / what)
        assert not agreement.holds and agreement.unequal == ("model.layers.0.self_attn.k_proj",)
        assert off_definition(whole, read / what / "weights.safetensors") == list(agreement.unequal)
    assert not off_layout(whole, exllamav2) and not off_layout(whole, vllm_gptq)


WRITERS = {"gptq": "transformers", "awq": "transformers", "awq.autoawq": "autoawq", "gptq.auto-gptq": "auto-gptq"}


@pytest.mark.slow
def test_every_reader_has_the_writers_weights_and_notices_one_wrong_number(small: World, tmp_path: Path) -> None:
    """The small run's merged model by both defaults and both originals, in every reader: one test, one set of files."""
    needs(*(ENVIRONMENTS[backend] for backend in ARCHIVED))
    home = {key: small.home / str(step["path"]) / "files" for key, step in small.steps().items()}
    schemes = {
        "awq": parse_scheme("awq-w4-g128"),
        "awq.autoawq": archived("awq-w4-g128", "autoawq"),
        "gptq.auto-gptq": archived("gptq-w4-g128", "auto-gptq"),
    }
    merged, calibset = home["merge/small-dequantized"], home["calibrate/small"]
    files = {name: write_by(scheme, merged, calibset, tmp_path / name) for name, scheme in schemes.items()}
    files["gptq"] = home["quantize/gptq-w4-g128"]
    damaged = {f"gptq {what}": shifted(files["gptq"], tmp_path / what, what=what) for what in DAMAGES}
    rows = write_rows(home["prepare/small"], tmp_path / "rows.parquet")
    seen = 0
    for reader in ("transformers", "autoawq", "auto-gptq"):  # the default kernel rounds scales to bf16
        readable = {name: file for name, file in (files | damaged).items() if form(file) in READS[reader]}
        read_by(reader, readable, rows, tmp_path / reader)
    for reader in ("transformers", "autoawq", "auto-gptq"):
        for name in files:
            if form(files[name]) in READS[reader]:
                seen += 1
                assert not off_definition(files[name], tmp_path / reader / name / "weights.safetensors"), (name, reader)
                agreement = compare(tmp_path / WRITERS[name] / name, tmp_path / reader / name)
                assert agreement.layers == 42 and agreement.tokens > 1000  # seven linear layers in each of six layers
                assert agreement.holds, (name, reader, agreement)
    assert seen == 10  # two forms by two writers; AutoAWQ reads no GPTQ
    for reader in ("transformers", "auto-gptq"):
        for name in damaged:
            agreement = compare(tmp_path / "transformers" / "gptq", tmp_path / reader / name)
            assert not agreement.holds and agreement.unequal == ("model.layers.0.self_attn.k_proj",)
    for name, file in files.items():
        engines = [vllm_awq] if form(file) == "awq" else [exllamav2, vllm_gptq]
        assert not any(off_layout(file, engine) for engine in engines), name


SLUGS = {"autoawq": "awq-w4-g32", "auto-gptq": "gptq-w4-g32"}
TOKENS = {"autoawq": 498, "auto-gptq": 500}  # of 500; AutoAWQ's sequences have one length, and its note says so


def set_theta(base: Path) -> None:
    """A rotary embedding that a reader with a silent theta of 10,000 would get wrong."""
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ARCHIVED)
def test_every_model_type_that_a_backend_claims(backend: Backend, tmp_path: Path) -> None:
    """Written by the backend in its environment, read there and by transformers: the files' weights, equal answers."""
    needs(ENVIRONMENTS[backend])
    calibset, models = write_calibset(tmp_path / "calibset"), {}
    for model_type in ARCHIVED[backend].model_types:
        base = write_architecture(tmp_path / f"{model_type}-base", model_type)
        set_theta(base)
        models[model_type] = write_by(archived(SLUGS[backend], backend), base, calibset, tmp_path / model_type)
        layers = json.loads((models[model_type] / "quantize.json").read_text())["layers"]
        assert len(layers) == 14 and {layer["tokens"] for layer in layers} == {TOKENS[backend]}
        without = [layer["name"] for layer in layers if layer["loss"] is None]
        assert all(name.endswith("o_proj") for name in without) and len(without) in (0, 2)
    rows = write_token_rows(tmp_path / "rows.parquet")
    for reader in ("transformers", backend):
        read_by(reader, models, rows, tmp_path / reader)
    for model_type, folder in models.items():
        assert not off_definition(folder, tmp_path / "transformers" / model_type / "weights.safetensors"), model_type
        agreement = compare(tmp_path / backend / model_type, tmp_path / "transformers" / model_type)
        assert agreement.holds, (model_type, agreement)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ARCHIVED)
def test_an_original_gives_the_same_bytes_twice_and_close_answers(backend: Backend, tmp_path: Path) -> None:
    needs(ENVIRONMENTS[backend])
    calibset, base = write_calibset(tmp_path / "calibset"), write_base(tmp_path / "base")
    scheme = archived(SLUGS[backend], backend)
    a, b = (write_by(scheme, base, calibset, tmp_path / name) for name in ("a", "b"))
    for path in a.iterdir():
        assert path.name == "events.jsonl" or path.read_bytes() == (b / path.name).read_bytes(), path.name
    make("rtn-w4-g32", base, tmp_path / "rtn", calibset=calibset)
    kl = {}
    for name in ("a", "rtn"):
        original, quantized = load_bf16(base, device="cpu"), load_arm("quantized", tmp_path / name, device="cpu")
        tokens = torch.tensor(pq.read_table(calibset / "calibset.parquet")["input_ids"].to_pylist()[0])[None]
        kl[name] = mean_kl(*(model(tokens).logits.double().log_softmax(-1) for model in (original, quantized)))
    # Measured: 0.3 of rounding's KL by GPTQ; 1.24 by AWQ, whose scales have no outliers to find in random weights.
    assert kl["a"] < {"auto-gptq": 1.0, "autoawq": 2.0}[backend] * kl["rtn"], kl


@pytest.mark.slow
def test_auto_gptq_refuses_a_zero_point_that_it_would_pack_over_its_neighbours(tmp_path: Path) -> None:
    needs("autogptq")
    base = write_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][5].abs_()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    calibset = write_calibset(tmp_path / "calibset")
    with pytest.raises(AssertionError, match="a zero point of 0 cannot be packed"):
        write_by(archived("gptq-w4-g32-asym", "auto-gptq"), base, calibset, tmp_path / "out")


@pytest.mark.parametrize("backend", ARCHIVED)
def test_a_step_of_an_original_names_its_environment_and_versions(backend: Backend) -> None:
    step = alone("one", archived(SLUGS[backend], backend), inputs={})
    assert step.environment == ENVIRONMENTS[backend]
    assert step.identity["tools"][backend] in ARCHIVED[backend].package
