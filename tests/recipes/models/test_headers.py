"""Model folders: what headers say, and every way in which a folder is no base."""

import json
from pathlib import Path

import pytest

from recipes.models.headers import read_headers
from recipes.models.weights import read_tensors
from recipes.problem import Problem, RecipeError
from tests.recipes.folders import llama_shapes, write_base, write_safetensors


def refused(folder: Path) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        read_headers(folder)
    return caught.value.problems


def test_sizes_by_hand(tmp_path: Path):
    headers = read_headers(write_base(tmp_path, hidden=128, intermediate=256, kv=64, layers=2, vocabulary=300))
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128
    assert headers.linear_parameters == 2 * layer
    assert headers.embedding_parameters == 300 * 128
    assert headers.parameters == 2 * (layer + 128) + 300 * 128 + 128
    assert headers.weight_bytes == 2 * headers.parameters
    assert (headers.vocabulary, headers.layers, headers.max_positions, headers.kv_features) == (300, 2, 512, 64)
    assert (headers.tied, headers.has_chat_template, headers.largest_in_features) == (True, True, 256)
    assert len(headers.linears) == 14 and len(headers.decoder_layer) == 7
    down = next(layer for layer in headers.linears if layer.name == "model.layers.1.mlp.down_proj")
    assert (down.in_features, down.out_features, down.family) == (256, 128, "model.layers.*.mlp.down_proj")


def test_agrees_with_safetensors_itself(tmp_path: Path):
    from safetensors import safe_open

    headers = read_headers(write_base(tmp_path))
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert theirs == {name: tensor.shape for name, tensor in headers.tensors.items()}


def test_gpt2_keeps_its_weights_transposed(tmp_path: Path):
    write_base(tmp_path, layers=1, config={"model_type": "gpt2"})
    write_safetensors(tmp_path / "model.safetensors", {"wte.weight": [300, 128], "h.0.attn.c_attn.weight": [128, 384]})
    (layer,) = read_headers(tmp_path).linears
    assert (layer.in_features, layer.out_features) == (128, 384)


def test_routers_experts_and_lm_head(tmp_path: Path):
    write_base(tmp_path, layers=1, config={"head_dim": 32})
    shapes = {
        "lm_head.weight": [300, 128],
        "model.embed_tokens.weight": [300, 128],
        "model.layers.0.mlp.gate.weight": [4, 128],
        "model.layers.0.mlp.experts.3.w1.weight": [256, 128],
    }
    write_safetensors(tmp_path / "model.safetensors", shapes)
    headers = read_headers(tmp_path)
    assert [layer.name for layer in headers.linears] == ["model.layers.0.mlp.experts.3.w1"]
    assert not headers.tied and headers.embedding_parameters == 2 * 300 * 128


def test_shards_and_a_missing_one(tmp_path: Path):
    write_base(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shapes = llama_shapes(hidden=128, intermediate=256, kv=64, layers=2, vocabulary=300)
    halves = dict(list(shapes.items())[:8]), dict(list(shapes.items())[8:])
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, half in zip(names, halves, strict=True):
        write_safetensors(tmp_path / name, half)
    assert len(read_headers(tmp_path).linears) == 14
    (tmp_path / names[1]).unlink()
    (problem,) = refused(tmp_path)
    assert names[1] in problem.what and names[0] not in problem.what
    assert problem.where.endswith("model.safetensors.index.json")


def test_no_config_and_an_adapter_in_place_of_a_base(tmp_path: Path):
    write_base(tmp_path)
    (tmp_path / "config.json").unlink()
    (problem,) = refused(tmp_path)
    assert "no config.json" in problem.what
    (tmp_path / "adapter_config.json").write_text("{}")
    (problem,) = refused(tmp_path)
    assert "adapter" in problem.why


def test_pickles_only_are_refused_by_name_with_the_way_to_convert(tmp_path: Path):
    write_base(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (problem,) = refused(tmp_path)
    assert "pytorch_model.bin" in problem.what and "run code" in problem.why and "save_pretrained" in problem.next


def test_no_weights_and_no_tokenizer_are_two_problems(tmp_path: Path):
    write_base(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tokenizer.json").unlink()
    weights, tokenizer = refused(tmp_path)
    assert "no safetensors" in weights.what and "no tokenizer" in tokenizer.what


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_files(tmp_path: Path, kept: int):
    path = write_base(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    problem = refused(tmp_path)[0]
    assert "truncated" in problem.what and problem.where == str(path)


def test_a_git_lfs_pointer_says_what_to_run(tmp_path: Path):
    path = write_base(tmp_path) / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(tmp_path)[0].next


def test_a_quantized_model_is_no_base(tmp_path: Path):
    write_base(tmp_path, config={"quantization_config": {"quant_method": "gptq"}})
    (problem,) = refused(tmp_path)
    assert "quantized already" in problem.what


def test_an_index_that_names_absent_tensors(tmp_path: Path):
    folder = tmp_path / "base"
    folder.mkdir()
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (folder / "part.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    placed = {"a": "part.safetensors", "b": "part.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(RecipeError, match=r"1 tensor\(s\) that are not in its files: b"):
        read_tensors(folder)
