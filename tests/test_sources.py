"""What our sources never call: pickles, YAML that makes objects, shells, models that bring code, unpacked archives."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from recipes.checks import lm_eval_tasks
from recipes.read import yamlfile
from tasks.runtime.process.launch import CHECKOUT

PACKAGES = ("flows", "tasks", "recipes")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "zipfile"}
CALLS = {
    "torch.load": "a pickle",
    "torch.save": "a pickle",
    "pandas.read_pickle": "a pickle",
    "pd.read_pickle": "a pickle",
    "yaml.unsafe_load": "makes objects",
    "yaml.full_load": "makes objects",
    "shutil.unpack_archive": "writes where the archive says",
    "os.system": "a shell",
    "os.popen": "a shell",
    "eval": "runs text",
    "exec": "runs text",
    "__import__": "imports by text",
    "tempfile.mktemp": "a name that somebody else can take",
}
LOADERS = {"Loader": yamlfile.Loader, "_Loader": lm_eval_tasks._Loader}  # of our yaml.load calls; safe ones, see below
IMPORTS = {  # every import by text, and why its text is ours
    "flows/cli.py": "a constant: the module that the parser names beside the command",
    "tasks/runtime/process/child.py": "job.json's entry, which the parent wrote from its own code; our own packages",
    "tasks/runtime/process/forks.py": "a constant of flows/pipeline.py: what jobs import",
    "tasks/jobs/quantize.py": "a backend out of the recipe's closed list",
    "tasks/jobs/backends/autoawq.py": "a constant",
    "tasks/jobs/backends/auto_gptq.py": "a constant",
    "recipes/data/folders.py": "a constant",
    "recipes/data/raw/arrow_rows.py": "a constant",
    "recipes/data/raw/opening.py": "a constant",
    "tasks/jobs/scorers/python_callable.py": "the user's function, see recipes/checks/python.py",
}

TEMPLATES = {  # every place that renders a template, and what holds it
    "flows/report/html.py": "our own template, every value escaped",
    "tasks/jobs/text/chat_template.py": "Jinja's sandbox, within bounds",
    "tasks/jobs/reload.py": "the same, by transformers",
    "tasks/jobs/scorers/harness.py": "the same, by lm-eval and transformers",
    "recipes/quickstart/make_base.py": "our own template",
}
RENDERS = {"apply_chat_template", "_compile_jinja_template", "render_jinja_template", "Environment", "from_string"}


def dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{dotted(value)}.{name}"
        case _:
            return "?"


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def wrong(tree: ast.AST) -> Iterator[str]:
    """`line: what` of all that is forbidden anywhere."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [one.name for one in names if one.name.split(".")[0] in PICKLES]
            case ast.ImportFrom(module=module):
                found = [module] if (module or "").split(".")[0] in PICKLES else []
            case ast.Call():
                found = list(wrong_call(node))
            case _:
                continue
        yield from (f"{node.lineno}: {one}" for one in found)


def wrong_call(node: ast.Call) -> Iterator[str]:
    name, given = dotted(node.func), {one.arg: one.value for one in node.keywords if one.arg}
    if name in CALLS:
        yield f"{name}: {CALLS[name]}"
    for argument in ("allow_pickle", "shell", "trust_remote_code"):
        if argument in given and is_true(given[argument]):
            yield f"{name}({argument}=True)"
    if name == "yaml.load" and dotted(given.get("Loader") or (node.args[1:2] or [ast.Name("none")])[0]) not in LOADERS:
        yield "yaml.load with another loader than ours"
    if name.rpartition(".")[2] in ("Environment", "Template") and not is_true(given.get("autoescape", node.func)):
        yield f"{name} without autoescape"
    if name.endswith(".bind") and "0.0.0.0" in ast.dump(node):
        yield "listens at all addresses"
    if name.endswith(".from_pretrained") and "local_files_only" not in given and "PeftModel" not in name:
        yield f"{name} may ask a hub"


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py"))


def test_no_source_does_what_is_forbidden() -> None:
    files = sources()
    assert len(files) > 150 and {path.parent.name for path in files} >= {"jobs", "backends", "scorers", "runtime"}
    trees = {str(path.relative_to(CHECKOUT)): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    assert [f"{name}:{one}" for name, tree in trees.items() for one in wrong(tree)] == []
    named = {"importlib.import_module", "importlib.util.spec_from_file_location", "import_module"}
    by_text = {
        name
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in named
    }
    assert by_text == set(IMPORTS)


def test_templates_are_rendered_where_they_are_held() -> None:
    """A chat template comes with a model: whatever renders one has to bound it."""
    calls = {
        (str(path.relative_to(CHECKOUT)), dotted(node.func).rpartition(".")[2])
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert {name for name, call in calls if call in RENDERS} == set(TEMPLATES)
    for name in ("tasks/jobs/text/chat_template.py", "tasks/jobs/reload.py", "tasks/jobs/scorers/harness.py"):
        assert {call for file, call in calls if file == name} & {"bounds", "bounded"}, name


@pytest.mark.parametrize(
    "line",
    [
        "jinja2.Environment(loader=loader)",
        "Template(text)",
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.FullLoader)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, local_files_only=True, trust_remote_code=True)",
        "AutoModel.from_pretrained(name)",
        "server.bind(('0.0.0.0', 0))",
        "eval(text)",
    ],
)
def test_the_scan_finds_each(line: str) -> None:
    assert list(wrong(ast.parse(line)))


@pytest.mark.parametrize("loader", LOADERS.values())
def test_our_yaml_loaders_make_no_objects(loader: type[yaml.SafeLoader]) -> None:
    assert issubclass(loader, yaml.SafeLoader)
    for text in ("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/object/new:dict {}"):
        with pytest.raises(yaml.YAMLError):
            yaml.load(text, loader)
