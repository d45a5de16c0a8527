"""Reading recipes: every error at once, with file, line and the nearest name; extends; --set."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from recipes.problem import Problem, RecipeError
from recipes.read.load import InvalidRecipe, Loaded, load
from recipes.schema import Recipe, recipe_of_run

MINIMAL = "name: test\nmodel: {base: base}\ndata: {path: rows.jsonl}\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path, *sets: str) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load(path, sets=sets)
    assert all(part for problem in caught.value.problems for part in problem.as_dict().values())
    return caught.value.problems


def loaded(folder: Path, text: str, *sets: str) -> Loaded:
    return load(write(folder, text), sets=sets)


def test_schema_to_yaml_to_schema_is_the_identity(tmp_path: Path):
    recipe = Recipe.model_validate(
        {
            "name": "round-trip",
            "model": {"base": "base", "chat_template": "chatml"},
            "data": {"path": "rows.jsonl", "domain": "kind", "dev": 0.2, "salt": "2026"},
            "train": {"learning_rate": 2e-5, "targets": ["q_proj"], "max_steps": 7, "alpha": 3.0},
            "quantize": {"schemes": ["rtn-w2-g32"]},
            "evaluate": {"scorers": [{"kind": "sql-execution", "databases": "db"}], "on_base": ["awq-w4-g64"]},
            "run": {"micro_batch": 4, "device": "cpu"},
        }
    )
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert loaded(tmp_path, text).recipe == recipe
    sparse = loaded(tmp_path, yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True)))
    assert sparse.recipe == recipe


def test_yaml_exponents_are_numbers_and_dates_are_text(tmp_path: Path):
    recipe = loaded(tmp_path, MINIMAL + "train: {learning_rate: 2e-4}\n", "data.salt=2026-11-24").recipe
    assert recipe.train.learning_rate == 2e-4
    assert recipe.data.salt == "2026-11-24"


def test_unknown_keys_get_the_nearest_name_and_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, MINIMAL + "train:\n  rank: 8\n  learnin_rate: 1.0e-3\nseed: 3\nmax_length: 12\nzzz: 1\n")
    rate, seed, length, zzz = refused(path)
    assert (rate.where, rate.next) == ("recipe.yaml:6 train.learnin_rate", "Did you mean `learning_rate`?")
    assert seed.where == "recipe.yaml:7 seed"
    assert length.next == "Did you mean `data.max_length`?"  # that key of another section
    assert "calibrate" in zzz.next and "evaluate" in zzz.next  # nothing is near: all keys are named


@pytest.mark.parametrize(
    ("field", "value", "needs"),
    [
        ("train.rank", "x", "a whole number"),
        ("train.rank", "1.5", "a whole number"),
        ("train.rank", "true", "a whole number"),
        ("train.rank", "0", "1 or more"),
        ("train.gradient_checkpointing", "1", "true or false"),
        ("train.targets", "3", "'all-linear' or a list"),
        ("data.dev", "0.7", "less than 0.5"),
        ("data.salt", "2026", "text"),
        ("run.device", "gpu", "'auto' or 'cpu' or 'cuda'"),
        ("quantize.schemes", "rtn-w4-g32", "a list"),
        ("measure", "3", "a section"),
        ("evaluate.scorers", "[{kind: sql}]", "'exact-match' or 'number' or 'json-schema'"),
        ("name", "My Run", "small letters"),
    ],
)
def test_wrong_types_are_named_in_plain_words(tmp_path: Path, field: str, value: str, needs: str):
    path = write(tmp_path, MINIMAL)
    (problem,) = refused(path, f"{field}={value}")
    assert needs in problem.what.removeprefix(f"`{field}` ")
    assert problem.where.startswith(f"--set {field}=")
    for jargon in ("pydantic", "Input should", "type=", "validation"):
        assert jargon not in str(problem)


def test_range_of_calibration_rows_says_why(tmp_path: Path):
    (problem,) = refused(write(tmp_path, MINIMAL + "calibrate:\n  rows: 64\n"))
    assert problem.where.endswith("recipe.yaml:5 calibrate.rows")
    assert "128 to 512" in problem.what and "Hessian" in problem.why


def test_calibration_of_another_size_needs_a_reason(tmp_path: Path):
    path = write(tmp_path, MINIMAL)
    assert (
        load(path, sets=["calibrate.rows=64", "calibrate.allow_unusual_size=a smoke test"]).recipe.calibrate.rows == 64
    )
    (problem,) = refused(path, "calibrate.stratify={a: 0.5, b: 0.4}")
    assert problem.where.endswith("calibrate.stratify") and "sum to 0.9" in problem.what
    (problem,) = refused(path, "calibrate.controls=[gptq-w4-g128]")
    assert "calibrate.general is missing" in problem.what


def test_micro_batch_has_to_divide_the_batch(tmp_path: Path):
    (problem,) = refused(write(tmp_path, MINIMAL + "run:\n  micro_batch: 5\n"))
    assert problem.where.endswith("recipe.yaml:5 run.micro_batch") and "16" in problem.what


def test_missing_fields_and_empty_files(tmp_path: Path):
    missing = {problem.where.split(" ")[-1] for problem in refused(write(tmp_path, "model: {}\n"))}
    assert missing == {"name", "model.base", "data"}
    (empty,) = refused(write(tmp_path, "# nothing\n"))
    assert "empty" in empty.why and "quench init" in empty.next
    (listed,) = refused(write(tmp_path, "- a\n"))
    assert "not a recipe" in listed.what


def test_missing_file_names_its_neighbour(tmp_path: Path):
    write(tmp_path, MINIMAL)
    (problem,) = refused(tmp_path / "recipes.yaml")
    assert "recipe.yaml" in problem.next and "No such file" in problem.why


def test_yaml_syntax_error_has_its_line(tmp_path: Path):
    (problem,) = refused(write(tmp_path, "name: test\nmodel: {base: base\ndata: x\n"))
    assert problem.where.endswith("recipe.yaml:3")


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path):
    (problem,) = refused(write(tmp_path, MINIMAL + "train:\n  rank: 4\n  alpha: 8\n  rank: 8\n"))
    assert problem.where.endswith("recipe.yaml:7 train.rank") and "recipe.yaml:5" in problem.why


def test_everything_wrong_is_told_at_once(tmp_path: Path):
    text = "name: Test\nmodel: {base: b, revison: x}\ndata: {path: 3}\ntrain: {rank: x}\ntrain: {rank: y}\n"
    assert len(refused(write(tmp_path, text), "nonsense", "calibrate.rows=1")) == 7


def test_invalid_recipe_keeps_the_rest_for_further_checks(tmp_path: Path):
    with pytest.raises(InvalidRecipe) as caught:
        load(write(tmp_path, MINIMAL + "train: {rnak: 3}\nquantize: {schemes: [gptq-w5-g1]}\n"))
    assert caught.value.rest is not None
    assert caught.value.rest.recipe.quantize.schemes == ["gptq-w5-g1"]


# ---- extends


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path):
    write(
        tmp_path, MINIMAL + "train: {rank: 4, alpha: 8}\nquantize: {schemes: [rtn-w4-g32, rtn-w3-g32]}\n", "base.yaml"
    )
    child = loaded(tmp_path, "extends: base.yaml\nname: child\ntrain: {rank: 6}\nquantize: {schemes: [rtn-w8-g32]}\n")
    recipe = child.recipe
    assert (recipe.name, recipe.train.rank, recipe.train.alpha) == ("child", 6, 8)
    assert recipe.quantize.schemes == ["rtn-w8-g32"]
    assert child.where("train.rank").endswith("recipe.yaml:3 train.rank")
    assert child.where("train.alpha").endswith("base.yaml:4 train.alpha")
    assert child.where("train.seed").endswith("recipe.yaml:3 train.seed")  # a default stands where its section does


def test_scorers_are_a_list_and_replaced_as_one(tmp_path: Path):
    write(tmp_path, MINIMAL + "evaluate: {scorers: [{kind: sql-execution, databases: db}]}\n", "base.yaml")
    child = loaded(tmp_path, "extends: base.yaml\nevaluate: {scorers: [{kind: exact-match}]}\n")
    assert [scorer.kind for scorer in child.recipe.evaluate.scorers] == ["exact-match"]


@pytest.mark.parametrize(
    ("section", "field", "remedy"),
    [
        ("evaluate: {scorer: {kind: exact-match}}", "evaluate.scorer", "`scorers:` with `- kind: ...`"),
        ("run: {workers: 2}", "run.workers", "Remove it"),
    ],
)
def test_a_key_of_an_older_recipe_says_what_to_write(tmp_path: Path, section: str, field: str, remedy: str):
    (problem,) = refused(write(tmp_path, MINIMAL + section + "\n"))
    assert problem.where.endswith(f"recipe.yaml:4 {field}")
    assert remedy in problem.next


def test_the_recipe_of_an_older_run_is_still_read():
    values = {"name": "test", "model": {"base": "base"}, "data": {"path": "rows.jsonl"}}
    recipe = recipe_of_run({**values, "run": {"workers": None, "threads": 2}})
    assert recipe == recipe_of_run({**values, "run": {"threads": 2}}) and recipe.run.threads == 2
    with pytest.raises(ValidationError):
        recipe_of_run({**values, "run": {"gpus": 1}})


def test_an_error_in_the_extended_file_is_placed_there(tmp_path: Path):
    write(tmp_path, MINIMAL + "train: {rank: x}\n", "base.yaml")
    (problem,) = refused(write(tmp_path, "extends: base.yaml\n"))
    assert problem.where.endswith("base.yaml:4 train.rank")


def test_circles_missing_files_and_lists_in_extends(tmp_path: Path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    circle = next(problem for problem in refused(tmp_path / "a.yaml") if "circle" in problem.what)
    assert circle.where.endswith("b.yaml:1 extends") and "a.yaml -> " in circle.why
    (missing,) = refused(write(tmp_path, "extends: c.yaml\n" + MINIMAL))
    assert missing.where.endswith("recipe.yaml:1 extends") and "c.yaml" in missing.what
    assert any("path of one file" in problem.what for problem in refused(write(tmp_path, "extends: [a]\n" + MINIMAL)))


def test_relative_paths_count_from_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = write(tmp_path, "{}", "shared/rows.jsonl")
    write(tmp_path, MINIMAL, "shared/base.yaml")
    child = load(write(tmp_path, "extends: ../shared/base.yaml\n", "mine/recipe.yaml"))
    assert child.data == [rows]
    here = write(tmp_path, "{}", "here/other.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    assert load(child.path, sets=["data.path=other.jsonl"]).data == [here]


# ---- --set


def test_set_overrides_fields_list_entries_and_sections(tmp_path: Path):
    text = MINIMAL + "quantize:\n  schemes: [rtn-w4-g32, rtn-w3-g32]\n"
    sets = ["quantize.schemes.1=gptq-w4-g64", "train.rank=4", "evaluate.on_base=[awq-w4-g64]", "data.general=null"]
    recipe = loaded(tmp_path, text, *sets).recipe
    assert recipe.quantize.schemes == ["rtn-w4-g32", "gptq-w4-g64"]
    assert (recipe.train.rank, recipe.evaluate.on_base, recipe.data.general) == (4, ["awq-w4-g64"], None)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("train.rank", "not an override"),
        ("=3", "not an override"),
        ("train..rank=3", "not an override"),
        ("quantize.schemes.5=rtn-w4-g32", "list of 1"),
        ("quantize.schemes.x=rtn-w4-g32", "list of 1"),
        ("name.x=3", "no section or list"),
        ("train.rank=[", "not YAML"),
        ("train.rnak=3", "Did you mean `rank`?"),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, item: str, says: str):
    path = write(tmp_path, MINIMAL + "quantize: {schemes: [rtn-w4-g32]}\n")
    (problem,) = refused(path, item)
    assert says in str(problem) and problem.where.startswith(f"--set {item}")


# ---- sources

HERE = "name: test\nmodel:\n  base: base\ndata:\n"


@pytest.mark.parametrize(
    ("data", "field", "says"),
    [
        ("  dev: 0.2\n", "data.path", "missing"),
        ("  sources: []\n", "data.path", "missing"),
        ("  path: a.jsonl\n  sources: [{path: b.jsonl}]\n", "data.sources", "beside data.path"),
        ("  format: text\n  sources: [{path: b.jsonl}]\n", "data.sources", "Each source has its own"),
        ("  sources: [{path: a.jsonl, domain: a}, {path: b.jsonl}]\n", "data.sources.1.domain", "missing"),
        ("  sources: [{path: a.jsonl, weight: 1.5}]\n", "data.sources.0.weight", "1 or less"),
        ("  sources: [{path: a.jsonl, weihgt: 0.5}]\n", "data.sources.0.weihgt", "Did you mean `weight`"),
        ("  path: a.jsonl\n  format: sharegtp\n", "data.format", "sharegpt"),
    ],
)
def test_sources_that_cannot_be_taken(tmp_path: Path, data: str, field: str, says: str):
    (problem,) = refused(write(tmp_path, HERE + data))
    assert problem.where.endswith(f" {field}") and says in str(problem)


def test_paths_of_sources_count_from_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = write(tmp_path, "{}", "shared/rows.jsonl")
    other = write(tmp_path, "{}", "here/other.csv")
    write(tmp_path, HERE + "  sources: [{path: rows.jsonl}, {path: org/rows}]\n", "shared/base.yaml")
    child = load(write(tmp_path, "extends: ../shared/base.yaml\n", "mine/recipe.yaml"))
    assert child.data == [rows, None]
    monkeypatch.chdir(tmp_path / "here")
    assert load(child.path, sets=["data.sources.1.path=other.csv"]).data == [rows, other]
    assert load(child.path, sets=["data.sources=[{path: other.csv}]"]).data == [other]
