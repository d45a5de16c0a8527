"""Templates and tokenizers from wherever a base has them: read, and the same from every folder that we write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recipes.models.chat_template import read_template
from recipes.schemes.slugs import parse_scheme
from tasks.jobs import merge, prepare, quantize
from tasks.jobs.text.rendering import Renderer
from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.runtime.tokenizer_files import copy_files
from tests.jobs.build import make_job, notes, write_jsonl
from tests.jobs.test_merge import plant_adapter
from tests.jobs.test_prepare import PARAMS, chat
from tests.jobs.text.templates import CHATML
from tests.jobs.text.test_rendering import TOOLS, samples_of
from tests.tiny import END, MARKED, write_base

ROWS = [{"messages": chat(f"what is {i} ?", f"it is {i}")} for i in range(60)]
TEXTS = ("year > 1990 and 2024", "a  b\n\n c", "the answer 12345", "é漢😀")


def dataset_of(base: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    data = write_jsonl(folder / "rows.jsonl", ROWS)
    job = make_job("prepare", folder / "dataset", params=PARAMS, data=data, tokenizer=base)
    prepare.run(job)
    return folder / "dataset", notes(job)


def without_class(folder: Path) -> Path:
    """A base whose tokenizer_config.json names no class: transformers picks one by the model type in config.json."""
    base = write_base(folder / "base", architecture="qwen3")
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["tokenizer_class"]
    path.write_text(json.dumps(config))
    return base


def ids_in(folder: Path) -> list[list[int]]:
    """As transformers alone reads the folder, without our code."""
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)(list(TEXTS))["input_ids"]


@pytest.mark.parametrize("name", ["additional", "in the config"])
def test_named_templates_are_read_and_travel(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=MARKED)
    tool_use = "{{- 'Use: ' + tools[0].function.name + tools[0].function.description + '\n' -}}" + MARKED
    if name == "additional":
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
    else:
        (base / "chat_template.jinja").unlink()
        path = base / "tokenizer_config.json"
        named = [{"name": "default", "template": MARKED}, {"name": "tool_use", "template": tool_use}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": named}))
    dataset, _ = dataset_of(base, tmp_path)
    for folder in (base, dataset / "tokenizer"):
        renderer = Renderer.open(folder)
        (plain,), (tooled,) = (samples_of(renderer, chat("a ?", "b"), tools) for tools in (None, TOOLS))
        texts = [renderer.tokenizer.decode(sample.rendered.input_ids) for sample in (plain, tooled)]
        assert texts[0].startswith("<|im_start|>user") and texts[1] == "Use: adda sum\n" + texts[0]
        assert sorted(read_template(folder).texts) == sorted([MARKED, tool_use])
    if name == "additional":
        copied = dataset / "tokenizer" / "additional_chat_templates" / "tool_use.jinja"
        assert copied.read_bytes() == tool_use.encode()


def test_a_template_in_chat_template_json_alone_is_read_and_left_for_engines(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", chat_template=False)
    text = json.dumps({"chat_template": MARKED}, indent=1)
    (base / "chat_template.json").write_text(text)
    assert read_template(base).texts == (MARKED,)
    dataset, said = dataset_of(base, tmp_path)
    assert (dataset / "tokenizer" / "chat_template.json").read_text() == text
    assert AutoTokenizer.from_pretrained(dataset / "tokenizer").chat_template == MARKED
    assert said["chat template"].startswith("it stood in chat_template.json alone")


def test_a_class_that_depends_on_config_json_is_the_same_in_every_folder(tmp_path: Path) -> None:
    base = without_class(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    copy_files(base, bare)
    assert ids_in(bare) != ids_in(base)  # what is prevented
    dataset, said = dataset_of(base, tmp_path)
    assert "depends on config.json" in said["tokenizer"]
    adapter = plant_adapter(base, tmp_path / "adapter")
    shutil.copytree(dataset / "tokenizer", adapter / "tokenizer", dirs_exist_ok=True)
    merged = tmp_path / "merged"
    merge.run(make_job("merge", merged, params={"onto": "original"}, base=base, adapter=adapter))
    params = parse_scheme("rtn-w4-g32").params() | {"seed": 0}
    quantize.run(make_job("quantize", tmp_path / "quantized", params=params, model=merged))
    for folder in (dataset / "tokenizer", adapter / "tokenizer", merged, tmp_path / "quantized"):
        assert ids_in(folder) == ids_in(base), folder
        assert type(load_tokenizer(folder)) is type(load_tokenizer(base))
    assert json.loads((merged / "config.json").read_text())["model_type"] == "qwen3"


def test_no_config_is_copied_where_the_class_does_not_depend_on_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    dataset, said = dataset_of(base, tmp_path)
    assert not (dataset / "tokenizer" / "config.json").exists()
    assert "tokenizer" not in said and "tokenizer.json" not in said
    assert ids_in(dataset / "tokenizer") == ids_in(base)


def test_a_base_that_disagrees_with_its_tokenizer_json_is_said(tmp_path: Path) -> None:
    _, said = dataset_of(without_class(tmp_path), tmp_path)
    assert "Qwen2Tokenizer, which splits texts otherwise" in said["tokenizer.json"]
    assert "'in 1990 and 2024' gets other tokens" in said["tokenizer.json"]


def test_settings_of_a_folder_are_read_by_recipes_and_jobs_alike(tmp_path: Path) -> None:
    folder = CHATML.renderer(tmp_path) and tmp_path
    (folder / "chat_template_args.json").write_text(
        json.dumps({"template_args": {"enable_thinking": False}, "template_date": "2026-01-31"})
    )
    template = read_template(folder)
    assert (template.args, template.day) == ({"enable_thinking": False}, "2026-01-31")
    assert not template.prints_today
    assert END in CHATML.template
