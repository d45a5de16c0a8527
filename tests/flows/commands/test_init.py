"""`quench init`: the recipe it writes passes the check as it is, and what cannot be used is refused."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands.init import InitResult, init
from flows.pins import pin
from flows.plan.card import plan_for
from flows.plan.fit import Setting
from flows.plan.machine import Memory
from flows.plan.memory import predict
from flows.plan.preflight import sampled
from flows.plan.row_sizes import row_sizes
from recipes.checks.check import check, check_data
from recipes.checks.serving import warnings
from recipes.data.rows import read_rows
from recipes.models.headers import read_headers
from recipes.problem import Problem, RecipeError
from recipes.read.load import Loaded, load
from recipes.schemes.scheme import PER_CHANNEL
from recipes.schemes.slugs import parse_scheme
from tasks import prepare
from tasks.runtime.step import Step
from tests.bench.shapes import SHAPES, write_shape
from tests.recipes.data.test_rows import write_as
from tests.recipes.folders import chat, write_base, write_rows


def project(folder: Path, *, rows: int = 260, **base: Any) -> None:
    write_base(folder / "base", **base)
    write_rows(folder / "tickets.jsonl", map(chat, range(rows)))


def start(folder: Path, **options: Any) -> InitResult:
    return init(str(folder / "base"), folder / "tickets.jsonl", out=folder / "recipe.yaml", **options)


def written(folder: Path, **options: Any) -> Loaded:
    loaded = load(start(folder, **options).path)
    assert [*check(loaded), *check_data(loaded).problems] == []
    return loaded


def refused(folder: Path, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        start(folder, **options)
    assert all(part for problem in caught.value.problems for part in problem.as_dict().values())
    return caught.value.problems


def test_it_passes_the_check_and_says_what_it_found(tmp_path: Path):
    project(tmp_path)
    loaded = written(tmp_path)
    text = loaded.text
    assert (loaded.recipe.name, loaded.recipe.model.base, loaded.recipe.data.path) == (
        "tickets",
        "base",
        "tickets.jsonl",
    )
    assert "Detected from tickets.jsonl:1" in text and "What comes after 0" in text
    counts = check_data(loaded).summary
    for name in ("dev", "test"):
        assert f"{counts[name]['rows']} rows" in text
    assert "32, 64, 128" in text and f"{counts['train']['rows']} are left for train" in text
    assert loaded.recipe.evaluate.scorers[0].kind == "exact-match"
    assert 128 <= loaded.recipe.calibrate.rows <= min(256, counts["train"]["rows"])


def test_it_ends_with_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    made = init("base", "tickets.jsonl", out=Path("recipe.yaml"))
    assert made.text.splitlines()[-1].strip() == "quench run recipe.yaml" == made.next
    assert "look at what is trained: quench show recipe.yaml" in made.text
    assert json.loads(json.dumps(made.as_dict()))["path"] == "recipe.yaml"


@pytest.mark.parametrize("sizes", [(64, 192, 64), (96, 352, 96), (128, 256, 64), (256, 768, 128)])
def test_schemes_are_legal_for_every_shape(tmp_path: Path, sizes: tuple[int, int, int]):
    hidden, intermediate, kv = sizes
    project(tmp_path, hidden=hidden, intermediate=intermediate, kv=kv)
    recipe = written(tmp_path).recipe
    shapes = read_headers(tmp_path / "base").linears
    for slug in (*recipe.quantize.schemes, *recipe.evaluate.on_base):
        assert parse_scheme(slug).fits(shapes), slug
    largest = max(group for group in (32, 64, 128) if hidden % group == intermediate % group == 0)
    assert f"rtn-w4-g{largest}" in recipe.quantize.schemes
    assert len(recipe.quantize.schemes) >= 2


def test_prompt_completion_and_columns(tmp_path: Path):
    project(tmp_path)
    topics = ["billing", "login", "shipping"]
    rows = [
        {
            "prompt": f"Ticket {number}",
            "completion": topics[number % 3],
            "id": f"id{number}",
            "channel": "ab"[number % 2],
            "topic": topics[number % 3],
            "conversation_id": number // 2,
            "thread": number // 2,
        }
        for number in range(400)
    ]
    write_rows(tmp_path / "tickets.jsonl", rows)
    data = written(tmp_path).recipe.data
    assert (data.format, data.domain, data.group) == ("prompt-completion", "topic", "conversation_id")
    for row in rows:
        del row["topic"], row["conversation_id"]
    write_rows(tmp_path / "tickets.jsonl", rows)
    data = written(tmp_path, force=True).recipe.data
    assert (data.domain, data.group) == ("channel", None)  # ids have too many values; no group is guessed


def test_lengths_cover_the_rows_and_end_where_the_base_does(tmp_path: Path):
    project(tmp_path)
    loaded = written(tmp_path)
    longest = max(sum(len(turn["content"]) for turn in chat(number)["messages"]) for number in range(260))
    assert longest < loaded.recipe.data.max_length <= 512  # a vocabulary of 300: a token is hardly more than a byte
    long = chat(1000)
    long["messages"][0]["content"] *= 100
    write_rows(tmp_path / "tickets.jsonl", [*map(chat, range(260)), long])
    assert written(tmp_path, force=True).recipe.data.max_length == loaded.recipe.data.max_length  # one row in 261
    write_base(tmp_path / "base", config={"max_position_embeddings": 128})
    recipe = written(tmp_path, force=True).recipe
    assert recipe.data.max_length <= 128 and recipe.measure.prompt_tokens + recipe.measure.new_tokens <= 128


def test_batches_are_fitted_to_memory(tmp_path: Path):
    project(tmp_path, rows=1000, vocabulary=50_000)
    roomy = written(tmp_path, memory=Memory(64.0, None)).recipe
    assert roomy.micro_batch == roomy.train.batch_size == 16
    # 1.5 GiB is little more than the processes themselves need; a fifth of it is left to others.
    tight = written(tmp_path, memory=Memory(1.5, None), force=True).recipe
    assert tight.micro_batch < 16 and 16 % tight.micro_batch == 0
    read = read_rows(tmp_path / "tickets.jsonl")
    rows = row_sizes(read.rows, data_bytes=(tmp_path / "tickets.jsonl").stat().st_size, per_byte=1 / 3)
    steps = predict(tight, read_headers(tmp_path / "base"), rows=rows)
    assert max(step.needed_gib for step in steps) <= 0.8 * 1.5
    assert "0.2 GiB are free" in refused(tmp_path, memory=Memory(0.3, None), force=True)[0].what


def test_a_recipe_for_a_card_that_is_not_here(tmp_path: Path):
    """An 8B on 24 GiB: what `quench plan` says of the recipe is that every measured step fits as it is."""
    write_shape(tmp_path / "base", SHAPES["Llama-8B"])
    long = chat(0)
    long["messages"][0]["content"] *= 60
    write_rows(tmp_path / "tickets.jsonl", [*map(chat, range(2000)), *(long | {"n": number} for number in range(200))])
    card = Memory(64.0, 24.0)
    recipe = written(tmp_path, card=card).recipe
    assert recipe.micro_batch < 16 or recipe.train.gradient_checkpointing
    plan = plan_for(tmp_path / "recipe.yaml", card)
    assert all(step.setting == Setting({}) for step in plan.steps if step.needs.confirmed)
    small = refused(tmp_path, card=Memory(64.0, 12.0), force=True)
    assert any(problem.where.startswith("evaluate/") and "weights bf16" in problem.why for problem in small)


def test_the_line_of_a_recipe_names_the_card(tmp_path: Path):
    write_shape(tmp_path / "base", SHAPES["0.6B"])
    write_rows(tmp_path / "tickets.jsonl", map(chat, range(260)))
    text = start(tmp_path, card=Memory(float("inf"), 16.0)).path.read_text()
    assert "of 16.0 GiB free on the GPU" in text


# ---- refusals


def test_a_base_without_a_template_gets_a_proposal_by_name(tmp_path: Path):
    project(tmp_path, template=False)
    (problem,) = refused(tmp_path)
    assert "quench init --model" in problem.next and "--chat-template chatml" in problem.next
    assert written(tmp_path, chat_template="chatml").recipe.model.chat_template == "chatml"
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    own = written(tmp_path, chat_template=str(tmp_path / "mine.jinja"), force=True)
    assert own.recipe.model.chat_template == "mine.jinja"


def test_a_second_template_is_refused(tmp_path: Path):
    project(tmp_path)
    assert "Leave --chat-template out" in refused(tmp_path, chat_template="chatml")[0].next


@pytest.mark.parametrize("rows", [60, 100, 160])
def test_few_rows_get_a_recipe_with_a_note(tmp_path: Path, rows: int):
    project(tmp_path, rows=rows, intermediate=128)
    made = start(tmp_path)
    loaded = load(made.path)
    assert [*check(loaded), *check_data(loaded).problems] == []
    calibrate, train = loaded.recipe.calibrate, check_data(loaded).summary["train"]["rows"]
    assert 32 <= train < 128 and calibrate.rows == train * 9 // 10
    assert calibrate.allow_unusual_size == f"train has {train} rows"
    assert "# a reason; more rows would calibrate better" in loaded.text
    assert "The gate cannot pass: test has" in made.notes["gate"] and "quench check --data" in made.notes["gate"]
    written = made.path.read_text()
    made.path.write_text(written.replace("allow_unusual_size", "# allow_unusual_size"))
    with pytest.raises(RecipeError, match="it has to be 128 to 512"):
        load(made.path)


def test_enough_rows_need_no_note(tmp_path: Path):
    project(tmp_path, rows=2000)
    made = start(tmp_path)
    assert load(made.path).recipe.calibrate.allow_unusual_size is None and "unusual" not in made.path.read_text()


def test_few_rows_have_to_give_the_tokens_all_the_same(tmp_path: Path):
    project(tmp_path, rows=100, intermediate=8192)
    (problem,) = refused(tmp_path)
    assert problem.what.startswith("Calibration needs 32768 tokens") and "more rows, or longer ones" in problem.next


def test_fewer_than_32_rows_of_train_are_refused(tmp_path: Path):
    project(tmp_path, rows=35)
    (problem,) = refused(tmp_path)
    assert "at least 32" in problem.what and "43" in problem.next and "171" in problem.next


def test_a_base_that_no_group_size_divides_gets_a_scheme_without_groups(tmp_path: Path):
    project(tmp_path, hidden=40, intermediate=80, kv=40)
    loaded = written(tmp_path)
    assert [parse_scheme(str(one)).group_size for one in loaded.recipe.quantize.schemes] == [PER_CHANNEL]


def test_it_names_the_engine_that_the_check_warns_for(tmp_path: Path):
    project(tmp_path)
    loaded = written(tmp_path)
    assert loaded.recipe.serve.engine == "vllm" and warnings(loaded) == []


def test_everything_wrong_is_told_at_once(tmp_path: Path):
    project(tmp_path)
    (tmp_path / "base" / "tokenizer.json").unlink()
    write_rows(tmp_path / "tickets.jsonl", ["{"])
    (tmp_path / "recipe.yaml").write_text("mine")
    assert len(refused(tmp_path)) == 3
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_what_is_there_is_kept_unless_forced(tmp_path: Path):
    project(tmp_path)
    (tmp_path / "recipe.yaml").write_text("mine")
    (problem,) = refused(tmp_path)
    assert "--force" in problem.next and (tmp_path / "recipe.yaml").read_text() == "mine"
    assert start(tmp_path, force=True).path.read_text() != "mine"


def test_a_hub_id_is_written_down_unseen(tmp_path: Path):
    project(tmp_path)
    made = init("org/name", tmp_path / "tickets.jsonl", out=tmp_path / "recipe.yaml")
    loaded = load(made.path)
    assert loaded.base is None and check(loaded) == []
    assert "checked when the base is fetched" in loaded.text


def test_missing_model_and_data(tmp_path: Path):
    with pytest.raises(RecipeError) as caught:
        init(str(tmp_path / "no"), tmp_path / "no.jsonl", out=tmp_path / "recipe.yaml")
    assert {problem.where for problem in caught.value.problems} == {"--model", "--data"}
    assert not (tmp_path / "recipe.yaml").exists()


# ---- formats and kinds of files


def as_alpaca(number: int) -> dict[str, Any]:
    asked, answered = (turn["content"] for turn in chat(number)["messages"])
    return {"instruction": asked, "input": "", "output": answered}


def as_sharegpt(number: int) -> dict[str, Any]:
    asked, answered = (turn["content"] for turn in chat(number)["messages"])
    return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]}


@pytest.mark.parametrize(
    ("name", "format", "row"),
    [
        ("tickets.csv", "alpaca", as_alpaca),
        ("tickets.parquet", "sharegpt", as_sharegpt),
        ("tickets.json", "text", lambda number: {"text": chat(number)["messages"][0]["content"]}),
        ("tickets", "messages", chat),
    ],
)
def test_every_format_and_kind_of_file(tmp_path: Path, name: str, format: str, row: Callable[[int], dict[str, Any]]):
    write_base(tmp_path / "base")
    data = tmp_path / name
    if not data.suffix:
        data.mkdir()
    write_as(data if data.suffix else data / "train.parquet", [row(number) for number in range(260)])
    made = init(str(tmp_path / "base"), data, out=tmp_path / "recipe.yaml")
    loaded = load(made.path)
    assert [*check(loaded), *check_data(loaded).problems] == []
    assert (loaded.recipe.data.path, loaded.recipe.data.format, loaded.recipe.name) == (name, format, "tickets")
    assert "What comes after 0" in loaded.text and f"{format}, detected from" in made.notes["format"]
    sizes = sampled(loaded, read_headers(tmp_path / "base"))
    assert sizes is not None and sizes.rows == pytest.approx(260, rel=0.6)  # of CSV and arrays by size alone
    assert 20 < sizes.completion_tokens < 200


def test_pinned_sources_are_the_inputs_of_prepare(tmp_path: Path):
    project(tmp_path)
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "more" / "train.jsonl", map(chat, range(300, 400)))
    made = start(tmp_path).path
    listed = "data.sources=[{path: tickets.jsonl, format: messages}]"
    both = listed.replace("]", ", {path: more, weight: 0.5}]")

    def step(*sets: str) -> Step:
        loaded = load(made, sets=["data.path=null", "data.format=auto", *sets] if sets else [])
        pins = pin(loaded, tmp_path / "home")
        return prepare.step(loaded.recipe, data=pins.data, tokenizer=pins.tokenizer)

    first = step(both)
    assert list(first.inputs) == ["tokenizer", "data", "data-1"]
    assert step().fingerprint == step(listed).fingerprint != first.fingerprint  # `path` is one source
    assert step(both.replace("0.5", "0.6")).fingerprint != first.fingerprint
    (tmp_path / "more" / "notes.txt").write_text("not a row")
    assert step(both).fingerprint == first.fingerprint
    write_rows(tmp_path / "more" / "train.jsonl", map(chat, range(300, 401)))
    assert step(both).fingerprint != first.fingerprint


def test_it_enables_prefects_plugin_and_leaves_a_pyproject_alone(tmp_path: Path):
    project(tmp_path)
    made = start(tmp_path)
    path = tmp_path / "pyproject.toml"
    assert tomllib.loads(path.read_text())["tool"]["prefect"]["plugins"] == {"enabled": True}
    assert "finetune-and-quantize" in made.notes["prefect"]
    assert "prefect" not in start(tmp_path, force=True).notes  # it is as it should be
    path.write_text("[project]\nname = 'mine'\n")
    told = start(tmp_path, force=True).notes["prefect"]
    assert "add [tool.prefect.plugins] enabled = true" in told
    assert path.read_text() == "[project]\nname = 'mine'\n"


def test_answers_have_room_for_the_longest_of_all_rows(tmp_path: Path):
    """Thinking and calls are decoded, too; a token is a byte in a vocabulary of 300."""
    project(tmp_path)
    short = written(tmp_path)
    longest = max(len(chat(number)["messages"][-1]["content"]) for number in range(260))
    limit = short.recipe.evaluate.max_new_tokens
    assert longest < limit <= short.recipe.data.max_length
    long = chat(1000)
    long["messages"][-1]["content"] = "over " * 40
    write_rows(tmp_path / "tickets.jsonl", [*map(chat, range(260)), *[long] * 15])
    assert written(tmp_path, force=True).recipe.evaluate.max_new_tokens > 200
    long["messages"][-1] |= {"content": "7", "reasoning_content": "over " * 40}
    write_rows(tmp_path / "tickets.jsonl", [*map(chat, range(260)), *[long] * 15])
    made = start(tmp_path, force=True)
    recipe = load(made.path).recipe
    assert recipe.evaluate.max_new_tokens > 200 and recipe.data.max_length > 200
    assert f"of up to {recipe.evaluate.max_new_tokens} tokens" in made.notes["answers"]
    (line,) = [line for line in made.path.read_text().splitlines() if "max_new_tokens" in line]
    assert "longest answer of all rows" in line and "scores 0" in line


def test_a_thousand_tokens_of_answer_are_not_cut_to_512(tmp_path: Path):
    project(tmp_path, config={"max_position_embeddings": 4096})
    long = chat(1000)
    long["messages"][-1]["content"] = "over " * 300
    write_rows(tmp_path / "tickets.jsonl", [*map(chat, range(260)), *[long | {"n": number} for number in range(60)]])
    recipe = written(tmp_path, force=True).recipe
    assert 1500 < recipe.evaluate.max_new_tokens <= recipe.data.max_length
