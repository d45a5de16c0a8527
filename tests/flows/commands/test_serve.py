"""`quench serve`: what it starts, what it refuses and offers instead, and that nothing of it is left running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.commands.servable import Machine
from flows.commands.serve_target import HELLO, Target, find_target
from flows.promotion.journal import Journal, Promotion
from recipes.problem import RecipeError
from tasks.runtime.process.environments import environment_problem, lock_digest
from tasks.runtime.process.launch import CHECKOUT
from tasks.runtime.process.ports import free_port
from tasks.runtime.store.local import read_json, write_json
from tests.flows.synthetic_run import BASE, SHAPES, SyntheticRun

MERGED, GPTQ, W3 = "merged-dequantized", "gptq-w4-g128", "rtn-w3-g128"
NAMES = ("base", "nf4-adapter", MERGED, GPTQ, W3, f"{GPTQ}.on-base")
SHAPED = {
    **{name: SHAPES[name] for name in NAMES},
    **{f"{GPTQ}.kv-{kv}": replace(SHAPES[GPTQ], kv=kv) for kv in ("fp8", "int8")},
    "base-nf4": replace(SHAPES["base"], kind="nf4"),
}
AVX512 = Machine("vllm", "cpu", 0, frozenset({"avx2", "avx512f"}))
AVX2 = Machine("vllm", "cpu", 0, frozenset({"avx2"}))
GPU = Machine("vllm", "cuda", 1, frozenset({"avx2"}))
PLAIN = Machine("transformers", "cpu", 0, frozenset({"avx2"}))
PROMPT = [{"role": "user", "content": "Who is over 20?"}]
START_S, END_S = 60, 30


@dataclass(frozen=True, kw_only=True)
class Made:
    """A run whose merged model is the quickstart's base."""

    home: Path
    run: Path

    def target(self, *words: str, machine: Machine = AVX512, length: int | None = None) -> Target:
        return find_target(words, self.home, machine, length=length)

    def refused(self, *words: str, machine: Machine = AVX512) -> tuple[str, str]:
        """What is wrong, and what is offered."""
        with pytest.raises(RecipeError) as caught:
            self.target(*words, machine=machine)
        (problem,) = caught.value.problems
        return problem.what, problem.next

    def files(self, key: str) -> Path:
        (folder,) = (self.home / "store" / key.partition("/")[0]).glob(f"{key.partition('/')[2]}-*/files")
        return folder


@pytest.fixture
def made(tmp_path: Path) -> Made:
    run = SyntheticRun(tmp_path, shapes=dict(SHAPED), test=8, general=0, measured=False).write()
    (tmp_path / "runs" / "latest").symlink_to(run.name)
    made = Made(home=tmp_path, run=run)
    merged = made.files("merge/dequantized")
    shutil.copytree(BASE, merged, dirs_exist_ok=True)
    origin = {"model": {"path": str(merged.relative_to(tmp_path)), "digest": "d" * 64}}
    for folder in (merged, *(made.files(f"quantize/{slug}") for slug in (GPTQ, W3, f"{GPTQ}.on-base"))):
        manifest = read_json(folder.parent / "manifest.json")
        files = {path.name: {"size": path.stat().st_size, "sha256": "0" * 64} for path in folder.iterdir()}
        write_json(folder.parent / "manifest.json", {**manifest, "files": files, "inputs": origin})
    adapter = {"r": 8, "peft_type": "LORA", "target_modules": ["q_proj"]}
    write_json(made.files("train/quickstart") / "adapter_config.json", adapter)
    lines = [("dev", "Other"), ("test", "long " * 200), ("test", PROMPT[0]["content"])]
    messages = [
        json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "SELECT 1"}])
        for _, text in lines
    ]
    table = pa.table({"split": [split for split, _ in lines], "messages": messages})
    pq.write_table(table, made.files("prepare/quickstart") / "rows.parquet")
    return made


def set_serve(made: Made, **serve: object) -> None:
    path = made.run / "recipe.resolved.json"
    write_json(path, {**read_json(path), "serve": serve})


# ---- what is started


def test_the_command_is_that_of_serve_json_for_the_recipe(made: Made) -> None:
    set_serve(made, engine="vllm", tensor_parallel=1, max_model_len=128)
    target = made.target(MERGED)
    assert target.folder == made.files("merge/dequantized") and target.name == MERGED and not target.remarks
    assert target.command == target.record["vllm"]["command"]
    words = " ".join(target.command)
    assert words.startswith(f"vllm serve $PWD --served-model-name {MERGED} --dtype bfloat16 --max-model-len 128")
    assert "--max-model-len 64" in " ".join(made.target(made.run.name, MERGED, length=64).command)


def test_the_example_is_the_first_short_row_of_test(made: Made) -> None:
    assert list(made.target(MERGED).example) == PROMPT
    (made.files("prepare/quickstart") / "rows.parquet").unlink()
    assert list(made.target(MERGED).example) == HELLO


def test_more_ranks_than_this_machine_has(made: Made) -> None:
    set_serve(made, engine="vllm", tensor_parallel=2)
    for machine in (AVX2, GPU):
        target = made.target(MERGED, machine=machine)
        assert "--tensor-parallel-size 1" in " ".join(target.command) and "tensor_parallel is 2" in target.remarks[0]
    two = made.target(MERGED, machine=GPU._replace(gpus=2))
    assert "--tensor-parallel-size 2" in " ".join(two.command) and not two.remarks


@pytest.mark.parametrize(
    ("arm", "machine"),
    [
        *((arm, machine) for arm in ("base", MERGED) for machine in (AVX2, AVX512, GPU, PLAIN)),
        *((GPTQ, machine) for machine in (AVX512, GPU, PLAIN)),
        *((f"{GPTQ}.kv-fp8", machine) for machine in (AVX512, GPU)),
        (W3, PLAIN),
    ],
)
def test_what_can_be_served(arm: str, machine: Machine, made: Made) -> None:
    target = made.target(arm, machine=machine)
    key = {"base": None, MERGED: "merge/dequantized"}.get(arm, f"quantize/{arm.partition('.')[0]}")
    assert target.folder == (made.files(key) if key else BASE)
    assert target.options == (("--kv-cache-dtype", "fp8") if "fp8" in arm else ())


# ---- what is refused


@pytest.mark.parametrize(
    ("arm", "machine", "what", "instead"),
    [
        (
            GPTQ,
            AVX2,
            "on this CPU",
            f"quench serve {MERGED}; or, slowly, quench serve {GPTQ} --engine transformers; or",
        ),
        (f"{GPTQ}.kv-fp8", AVX2, "on this CPU", f"quench serve {MERGED}; or serve"),
        (f"{GPTQ}.kv-int8", GPU, "KV cache", f"quench serve {GPTQ}"),
        (f"{GPTQ}.kv-fp8", PLAIN, "KV cache", f"quench serve {GPTQ} --engine transformers"),
        (W3, GPU, "3-bit weights", f"quench serve {GPTQ}; or in the recipe: Write"),
        ("nf4-adapter", GPU, "adapter on top", f"quench serve {MERGED}"),
        (f"{GPTQ}.on-base", GPU, "adapter on top", f"quench serve {GPTQ}; or quench export {GPTQ}.on-base DEST"),
        ("base-nf4", GPU, "base in NF4", f"quench serve {MERGED}"),
        ("gptq-w4-g12", GPU, "no arm", f"Did you mean {GPTQ}?"),
    ],
)
def test_the_nearest_that_can_be_served(arm: str, machine: Machine, what: str, instead: str, made: Made) -> None:
    said, offered = made.refused(arm, machine=machine)
    assert what in said and offered.startswith(instead)


def test_what_is_offered_names_the_run_where_it_was_named(made: Made) -> None:
    assert made.refused("2026", GPTQ, machine=AVX2)[1].startswith(f"quench serve 2026 {MERGED}")


def test_an_external_model_that_is_quantized(made: Made, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(BASE, theirs)
    steps = read_json(made.run / "steps.json")
    arm = {**steps["arms"][0], "slug": "theirs", "kind": "external", "external": True}
    origin = {"path": str(theirs), "digest": "d" * 64, "source": "x"}
    write_json(made.run / "steps.json", {**steps, "arms": [*steps["arms"], arm], "external": {"theirs": origin}})
    target = made.target("theirs", machine=AVX2)
    assert target.folder == theirs and target.record["chat_template"] and "theirs" in target.command
    config = read_json(theirs / "config.json")
    write_json(theirs / "config.json", {**config, "quantization_config": {"quant_method": "awq", "bits": 4}})
    assert made.target("theirs", machine=GPU).folder == theirs
    assert "cannot serve theirs" in made.refused("theirs", machine=AVX2)[0]
    shutil.rmtree(theirs)
    assert "not there any more" in made.refused("theirs", machine=GPU)[0]


def test_files_that_are_damaged_and_steps_that_failed(made: Made) -> None:
    (made.files("merge/dequantized") / "model.safetensors").write_bytes(b"x")
    assert "has 1 bytes" in made.refused(MERGED)[0]
    assert made.refused("base-nf4")[1] == "No arm of this run can be served here"
    steps = read_json(made.run / "steps.json")
    for step in steps["steps"]:
        if step["key"] == "merge/dequantized":
            step |= {"status": "failed", "path": None}
    write_json(made.run / "steps.json", steps)
    assert made.refused(MERGED)[0] == f"{MERGED} was not made."


# ---- a champion


def promoted(made: Made, arm: str, key: str) -> None:
    folder = made.files(key).parent
    line = {"at": "2026-11-24", "model": "sql", "version": 1, "event": "promoted", "outcome": "pass", "kind": "bf16"}
    path, digest = str(folder.relative_to(made.home)), read_json(folder / "manifest.json")["digest"]
    own = {"run": made.run.name, "arm": arm, "path": path, "digest": digest, "recipe": "r", "dataset": None}
    Journal(made.home, "sql").append(Promotion(**line, **own, champion=None))


def test_a_champion_is_served_under_its_models_name(made: Made) -> None:
    assert made.refused("sql@champion") == ("sql has no champion.", "quench promote, or name an arm: quench serve ARM")
    promoted(made, MERGED, "merge/dequantized")
    target = made.target("sql@champion", machine=AVX2)
    assert target.folder == made.files("merge/dequantized") and target.name == "sql"
    assert "--served-model-name sql " in " ".join(target.command)
    assert made.refused("other@champion")[1] == "quench serve sql@champion"
    assert made.refused("sql@3")[0] == "There is no @3."


def test_a_champion_whose_run_is_gone_has_its_own_serve_json(made: Made) -> None:
    promoted(made, MERGED, "merge/dequantized")
    record = {**made.target(MERGED).record, "max_model_len": 77}
    shutil.rmtree(made.run)
    assert "is not served here" in made.refused("sql@champion")[0]
    write_json(made.files("merge/dequantized") / "serve.json", record)
    target = made.target("sql@champion", length=99)
    assert target.record["max_model_len"] == 77 and target.options == ("--max-model-len", "99")
    write_json(made.files("merge/dequantized") / "serve.json", {**record, "scheme": GPTQ})
    assert "is not served here" in made.refused("sql@champion", machine=AVX2)[0]


def test_a_champion_that_is_not_in_the_store(made: Made) -> None:
    promoted(made, MERGED, "merge/dequantized")
    shutil.rmtree(made.files("merge/dequantized").parent)
    assert "is not in the store" in made.refused("sql@champion")[0]


# ---- the process


@pytest.fixture
def engines(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder of environments whose vLLM is a stand-in that behaves as named."""

    def make(behaviour: str) -> Path:
        program = tmp_path / "engines" / "vllm" / "bin" / "python"
        program.parent.mkdir(parents=True)
        stand_in = Path(__file__).with_name("stand_in_engine.py")
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stand_in}" {behaviour} "$@"\n')
        program.chmod(0o755)
        (tmp_path / "engines" / "vllm" / ".installed").write_text(lock_digest("vllm"))
        return tmp_path / "engines"

    return make


@dataclass(kw_only=True)
class Serving:
    """A `quench serve` that runs."""

    process: subprocess.Popen[str]
    log: Path

    def ready(self, within_s: float = START_S) -> dict[str, str]:
        """What it prints once it answers."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=within_s)
        return json.loads(line)

    def family(self) -> list[psutil.Process]:
        """Everything that it started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def logged(self, word: str) -> str:
        """The rest of the line of the engine's log that begins so."""
        lines = self.log.read_text().splitlines()
        return next(line.removeprefix(f"{word} ") for line in lines if line.startswith(f"{word} "))


SERVE = """
import sys; from pathlib import Path; from tasks.runtime.process import environments
environments.INSTALLED = Path(sys.argv.pop(1)); environments.CHECKOUT = environments.INSTALLED.parent
from flows.cli import main
sys.exit(main())
"""


@pytest.fixture
def serve(made: Made) -> Iterator[Callable[..., Serving]]:
    """Starts `quench serve merged-dequantized --json WORDS` with the engines of a folder; ends it after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(installed: Path, *words: str, **env: str) -> Serving:
        port = free_port()
        own = {"QUENCH_HOME": str(made.home), "PYTHONPATH": str(CHECKOUT), **env}
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(installed), "serve", MERGED, "--json", "--port", str(port), *words],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return Serving(process=process, log=made.home / "serve" / f"{MERGED}-{port}.log")

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=END_S)


def gone(processes: list[psutil.Process], within_s: float = END_S) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_it_answers_and_leaves_nothing(
    number: signal.Signals, code: int, engines: Callable[[str], Path], serve: Callable[..., Serving]
) -> None:
    serving = serve(engines("serves"), VLLM_API_KEY="hidden-key", HF_TOKEN="hf_hidden")
    said = serving.ready()
    assert said["model"] == MERGED and said["url"].startswith("http://127.0.0.1:")
    answer = subprocess.run(["sh", "-c", said["curl"]], capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "SELECT 1"
    assert "hidden" not in said["curl"] and "hidden" not in serving.log.read_text().replace("Bearer hidden-key", "")
    first = json.loads(serving.logged("asked").rpartition(" Bearer")[0])
    assert first == {"model": MERGED, "messages": PROMPT, "max_tokens": 1, "temperature": 0}
    words = json.loads(serving.logged("words"))
    assert words[:3] == ["-P", "-m", "vllm.entrypoints.openai.api_server"] and words[-4:-2] == ["--host", "127.0.0.1"]
    family = serving.family()
    assert int(serving.logged("child")) in {process.pid for process in family}
    serving.process.send_signal(number)
    assert serving.process.wait(END_S) == code and gone(family)


@pytest.mark.parametrize(
    ("behaviour", "why", "offered"),
    [
        ("dies", "larger KV cache is needed", "--max-model-len N"),
        ("breaks", "cpu_gemm_wna16", "Read its log"),
        ("ends", "the worker is gone", "Read its log"),
    ],
)
def test_an_engine_that_does_not_serve(
    behaviour: str, why: str, offered: str, engines: Callable[[str], Path], serve: Callable[..., Serving]
) -> None:
    serving = serve(engines(behaviour))
    out, _ = serving.process.communicate(timeout=START_S)
    assert serving.process.returncode == 1
    answer = json.loads(out.partition("\n")[2] if behaviour == "ends" else out)
    (problem,) = answer["problems"]
    assert why in problem["why"] and offered in problem["next"] and problem["where"] == str(serving.log)
    children = [int(line.split()[1]) for line in serving.log.read_text().splitlines() if line.startswith("child ")]
    assert len(children) == (behaviour != "dies")
    assert gone([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)])


def test_all_that_is_missing_is_said_at_once(made: Made, tmp_path: Path, serve: Callable[..., Serving]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serving = serve(tmp_path / "none", "--port", str(port))
        out, _ = serving.process.communicate(timeout=START_S)
    assert serving.process.returncode == 2
    said = {problem["what"]: problem["next"] for problem in json.loads(out)["problems"]}
    free = said.pop(f"Port {port} of 127.0.0.1 is taken.")
    assert said == {"The environment vllm is not installed.": "Run: make env-vllm"}
    assert free.startswith(f"quench serve {MERGED} --port ") and free.rpartition(" ")[2] != str(port)
    assert not (made.home / "serve").exists()


@pytest.mark.slow  # starts vLLM: a minute on two idle cores, several on busy ones
@pytest.mark.skipif(environment_problem("vllm") is not None, reason="make env-vllm")
def test_the_real_engine_answers_and_leaves_nothing(serve: Callable[..., Serving], made: Made) -> None:
    serving = serve(CHECKOUT / ".envs")
    said = serving.ready(within_s=1800)
    answer = subprocess.run(["sh", "-c", said["curl"]], capture_output=True, text=True, timeout=300, check=True)
    choice = json.loads(answer.stdout)["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    family = serving.family()
    assert len(family) >= 3, "the guard, the server and its engine"
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(END_S) == 0 and gone(family)
    assert not [line for line in _command_lines() if str(made.home) in line]


def _command_lines() -> list[str]:
    return [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
