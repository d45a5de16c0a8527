"""`quench check`: bad input is refused with what, where and next, from config, headers and the first row."""

import json
import os
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from recipes.checks.check import CHECKOUT, check, check_base, load_and_check
from recipes.problem import Problem, RecipeError
from recipes.read.load import load
from tests.recipes.folders import chat, write_base, write_project, write_rows

HEAVY = ("torch", "transformers", "prefect", "mlflow", "numpy", "pandas", "pyarrow")


def problems(recipe: Path, *sets: str) -> list[Problem]:
    refused = check(load(recipe, sets=sets))
    assert all(part for problem in refused for part in problem.as_dict().values())
    return refused


def only(recipe: Path, *sets: str) -> Problem:
    (problem,) = problems(recipe, *sets)
    return problem


def test_a_good_recipe_has_no_problem(tmp_path: Path):
    assert problems(write_project(tmp_path)) == []


def test_imports_are_light(tmp_path: Path):
    recipe = write_project(tmp_path)
    code = (
        "import sys; from recipes.checks.check import load_and_check; from pathlib import Path; "
        "import flows.plan.preflight, flows.commands.init, flows.commands.docs; "
        f"shown = lambda: print([name for name in {HEAVY!r} if name in sys.modules]); "
        "load_and_check(Path(sys.argv[1])); shown(); load_and_check(Path(sys.argv[1]), data=True); shown()"
    )
    run = [sys.executable, "-c", code, str(recipe)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(run, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.split("\n")[:2] == ["[]", "['numpy']"], done.stdout + done.stderr  # rows: it looks for leaks
    # Of CPU time: 0.4 s on a fast core, 1.0 s on a slow one, preflight's imports among it. With torch it is over 4 s.
    assert after.ru_utime - before.ru_utime < 4


# ---- model


def test_missing_base_names_its_neighbour(tmp_path: Path):
    recipe = write_project(tmp_path)
    problem = only(recipe, "model.base=bsae")
    assert "bsae" in problem.what and problem.next.endswith("base?") and "model.base" in problem.where


def test_a_hub_id_says_nothing_until_it_is_pinned(tmp_path: Path):
    recipe = write_project(tmp_path)
    assert problems(recipe, "model.base=org/name", "quantize.schemes=[rtn-w4-g128]") == []
    pinned = write_base(tmp_path / "pinned", hidden=96, intermediate=96, kv=96)
    of_base = check_base(load(recipe, sets=["model.base=org/name", "quantize.schemes=[rtn-w4-g128]"]), pinned)
    assert len(of_base) == 1 and "rtn-w4-g32" in of_base[0].next


def test_a_path_below_a_folder_that_is_there_is_no_hub_id(tmp_path: Path):
    recipe = write_project(tmp_path)
    assert "not there" in only(recipe, "model.base=base/inner").what


def test_a_base_without_tokenizer_and_safetensors(tmp_path: Path):
    recipe = write_project(tmp_path)
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    assert {problem.what.split(":")[0] for problem in problems(recipe)} == {
        "The base has its weights as pickles only",
        "The base has no tokenizer.",
    }


def test_chat_templates(tmp_path: Path):
    recipe = write_project(tmp_path, template=False)
    assert "chatml" in only(recipe).next
    assert problems(recipe, "model.chat_template=chatml") == []
    assert "model.chat_template" in only(recipe, "model.chat_template=none.jinja").where
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert problems(recipe, "model.chat_template=mine.jinja") == []
    write_base(tmp_path / "base")
    assert "of its own" in only(recipe, "model.chat_template=chatml").what


def test_a_template_that_prints_today_needs_its_day_in_the_recipe(tmp_path: Path):
    recipe = write_project(tmp_path)
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}{{ messages }}{{ enable_thinking }}")
    problem = only(recipe)
    assert "prints today's date" in problem.what
    assert f"`template_date: {date.today().isoformat()}` under `model:`" in problem.next
    assert problems(recipe, "model.template_date=2026-01-31", "model.template_args.enable_thinking=false") == []
    assert load(recipe, sets=["model.template_date=2026-01-31"]).recipe.model.template_date == "2026-01-31"
    for override, says in (("template_date=2026-02-31", "is no day"), ("template_args.tools=[]", "cannot be an")):
        with pytest.raises(RecipeError, match=says):
            load(recipe, sets=[f"model.{override}"])
    template.write_text("{{ messages }}")
    assert "prints no date" in only(recipe, "model.template_date=2026-01-31").what
    assert "reads no argument thinking" in only(recipe, "model.template_args.thinking=false").what


def test_lengths_that_the_base_was_not_made_for(tmp_path: Path):
    recipe = write_project(tmp_path)
    too_long = problems(recipe, "data.max_length=600", "calibrate.seq_len=1024", "measure.prompt_tokens=500")
    assert [problem.where.split(" ")[-1] for problem in too_long] == [
        "data.max_length",
        "calibrate.seq_len",
        "measure.prompt_tokens",
    ]
    assert "512" in too_long[0].next and "480" in too_long[2].next  # 512 - 32 new tokens


def test_targets_that_are_no_layer(tmp_path: Path):
    problem = only(write_project(tmp_path), "train.targets=[q_proj, up_prj]")
    assert problem.where.endswith("train.targets.1") and problem.next == "Did you mean up_proj?"


# ---- schemes


def test_group_size_that_divides_no_layer(tmp_path: Path):
    sizes = {"hidden": 96, "intermediate": 352, "kv": 96}
    recipe = write_project(tmp_path, **sizes, extra="quantize:\n  schemes:\n    - rtn-w4-g32\n    - gptq-w4-g128\n")
    problem = only(recipe)
    assert problem.where.endswith("recipe.yaml:12 quantize.schemes.1")
    assert "mlp.down_proj (in_features 352, 2 layers)" in problem.what and "self_attn.q_proj" in problem.what
    assert "gptq-w4-g32" in problem.next


def test_schemes_on_the_base_are_checked_as_well(tmp_path: Path):
    recipe = write_project(tmp_path, extra="evaluate:\n  on_base: [awq-w8-g128]\n")
    problem = only(recipe)
    assert problem.where.endswith("recipe.yaml:10 evaluate.on_base.0") and "4 bits" in problem.why


@pytest.mark.parametrize("heads", [[4, 4], 0, 2**63])
def test_what_the_plan_cannot_count_is_refused_by_the_check(tmp_path: Path, heads: object):
    recipe = write_project(tmp_path)
    path = load(recipe).base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_attention_heads": heads}))
    assert "num_attention_heads" in only(recipe).what


def test_a_scheme_that_stands_twice(tmp_path: Path):
    problem = only(write_project(tmp_path), "quantize.schemes=[rtn-w4-g32, rtn-w4-g32]")
    assert "twice" in problem.what and "quantize.schemes.1" in problem.where


# ---- files


def test_missing_data_and_general_files(tmp_path: Path):
    recipe = write_project(tmp_path)
    data, general = problems(recipe, "data.path=row.jsonl", "data.general=general.jsonl")
    assert data.next.endswith("rows.jsonl?") and "data.general" in general.where


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("", "empty"),
        ("{not json", "JSON"),
        ("[1]", "list"),
        ('{"say": "x"}', "`prompt` and `completion`"),
        ('{"prompt": "x"}', "`prompt` and `completion`"),
        ('{"prompt": "x", "completion": " "}', "empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "assistant"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "turn 1 is from 'robot'"),
    ],
)
def test_the_first_row_tells_the_format(tmp_path: Path, row: str, says: str):
    recipe = write_project(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [row] if row else [])
    assert says in str(only(recipe))


def test_columns_that_the_recipe_names(tmp_path: Path):
    recipe = write_project(tmp_path)
    write_rows(tmp_path / "rows.jsonl", (chat(number, kind="a") for number in range(260)))
    assert problems(recipe, "data.domain=kind") == []
    assert "`thread`" in str(only(recipe, "data.group=thread"))


def test_general_rows_need_text(tmp_path: Path):
    recipe = write_project(tmp_path)
    write_rows(tmp_path / "general.jsonl", [{"txt": "x"}])
    problem = only(recipe, "data.general=general.jsonl")
    assert problem.where.endswith("general.jsonl:1")


def test_sql_scorer_needs_its_databases(tmp_path: Path):
    recipe = write_project(tmp_path, extra="evaluate:\n  scorers: [{kind: sql-execution, databases: db}]\n")
    write_rows(tmp_path / "rows.jsonl", (chat(number, schema="shop") for number in range(260)))
    assert "not there" in only(recipe).what
    (tmp_path / "db").mkdir()
    assert "no *.sql file" in only(recipe).what
    (tmp_path / "db" / "shop.sql").write_text("CREATE TABLE a (b);")
    assert problems(recipe) == []


# ---- the checkout


def test_a_users_own_tasks_module_is_refused(tmp_path: Path):
    recipe = write_project(tmp_path)
    (tmp_path / "tasks.py").write_text("x = 1\n")
    code = (
        "import json, sys; sys.path.insert(1, sys.argv[1]); from pathlib import Path; "
        "from recipes.checks.check import check; "
    )
    code += (
        "from recipes.read.load import load; print(json.dumps([p.as_dict() for p in check(load(Path('recipe.yaml')))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(CHECKOUT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (problem,) = json.loads(done.stdout)
    assert problem["where"] == str((tmp_path / "tasks.py").resolve()) and "tasks.py" in problem["next"]
    assert problems(recipe) == []


# ---- all at once


def test_a_misspelled_key_does_not_hide_what_check_finds(tmp_path: Path):
    recipe = write_project(tmp_path, extra="train: {rnak: 3}\nquantize: {schemes: [gptq-w5-g128]}\n")
    write_rows(tmp_path / "rows.jsonl", [*map(chat, range(200)), "not json"])
    with pytest.raises(RecipeError) as caught:
        load_and_check(recipe, sets=["data.general=no.jsonl"], data=True)
    places = [problem.where for problem in caught.value.problems]
    for part in ("recipe.yaml:9 train.rnak", "quantize.schemes.0", "data.general", "rows.jsonl:201"):
        assert any(part in where for where in places), (part, places)
    assert len(places) == 4
