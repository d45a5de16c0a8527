"""Tasks of lm-evaluation-harness: their documents, asked of a loaded model, one score per document.

The data sets of tasks are read as all children read: from this machine. A relative path in a task of the recipe's own
counts from its folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase

from recipes.checks.lm_eval_tasks import find_tasks
from tasks.jobs.scorers import ScorerFailed, is_share
from tasks.runtime.bounds import OverBounds, bounds
from tasks.runtime.process.errors import StageError

Caches = Callable[[], Cache]  # an empty KV cache for a batch
SECONDS, MIB = 10.0, 512  # of the chat template for one document, as for a row (tasks.jobs.text.chat_template)
FEWSHOT_SEED = 1234  # lm_eval's own default
# What loading a task raises: no data set and no network, a loading script, a function that its YAML names.
LOADING = (OSError, RuntimeError, NotImplementedError, ImportError, AttributeError)


class DocumentScore(NamedTuple):
    """One document's score.

    Attributes:
        row: `task/number-hash`: arms are paired by it, and a document with other content is another row.
        task: Its task.
        score: 0 to 1.
    """

    row: str
    task: str
    score: float


class Harness:
    """The tasks of one entry of `evaluate.scorers`, loaded; no model is needed for that."""

    def __init__(self, params: Mapping[str, Any], include: Path | None) -> None:
        """Load the tasks and their documents.

        Args:
            params: What recipes.scorers says of an lm-eval entry.
            include: Folder of the recipe's own tasks.

        Raises:
            StageError: No such task, no data set on this machine, a task that runs generated code, no such metric.
        """
        self._params = params
        names = list(params["tasks"])
        tasks = find_tasks(names, include)
        if tasks.near:
            raise _unknown(tasks.near)
        folders = {path.parent for files in tasks.files.values() for path in files}
        with _inside(include):
            self._loaded = self._load(names, folders, include)
        for task in self._loaded["tasks"].values():
            _refuse(task)
            _render(task)
            self._metric(task)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    @property
    def documents(self) -> dict[str, int]:
        """Documents that are asked, by task."""
        limit = self._params["limit"]
        sizes = {name: len(task.eval_docs) for name, task in self._loaded["tasks"].items()}
        return {name: size if limit is None else min(size, limit) for name, size in sorted(sizes.items())}

    def _load(self, names: Sequence[str], folders: set[Path], include: Path | None) -> Any:
        """The named tasks, from an index of their own folders; from an index of all, where a group reaches further."""
        own: list[str | Path] = [include] if include else []
        few: list[str | Path] = [*sorted(folders - set(own)), *own]  # later ones win
        try:
            return TaskManager(include_path=few, include_defaults=False).load(list(names))
        except TemplateError as error:  # the library itself renders the first document, too
            raise _unaskable(", ".join(names), error) from error
        except (KeyError, ValueError):
            return self._load_from_all(names, own)
        except LOADING as error:
            raise _not_here(names, error) from error

    def _load_from_all(self, names: Sequence[str], own: list[str | Path]) -> Any:
        try:
            return TaskManager(include_path=own).load(list(names))
        except (KeyError, ValueError, *LOADING) as error:
            raise _not_here(names, error) from error

    def _metric(self, task: Task) -> tuple[str, str | None]:
        """Metric and filter (None: the first) of a task.

        Raises:
            StageError: The task does not have the metric, or lower values of it are better.
        """
        better: Mapping[str, bool] = task.higher_is_better() or {}
        metric, _, chosen = (self._params["metric"] or next(iter(better), "")).partition(",")
        if not better.get(metric, False):
            more = [name for name, higher in better.items() if higher]
            raise StageError.of(
                what=f"the task {task.task_name} has no metric `{metric}` of which more is better",
                where="evaluate.scorers, kind lm-eval",
                why=f"it has {', '.join(more) or 'none'}",
                next=f"write `metric: {more[0]}`" if more else "leave this task out",
            )
        return metric, chosen or None

    def run(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ends: Sequence[int],
        batch_size: int,
        caches: Caches | None = None,
        template_args: Mapping[str, Any] | None = None,
        prompt: Callable[[list[dict[str, str]]], str] | None = None,
    ) -> list[DocumentScore]:
        """Ask all documents.

        Args:
            model: A loaded arm.
            tokenizer: The data set's, with the chat template.
            ends: Token ids that end an answer. Stop strings never match the end-of-turn token, which is special.
            batch_size: Documents per forward pass.
            caches: Makes the arm's KV caches where they are quantized.
            template_args: Arguments that the template gets.
            prompt: Renders a history where the tokenizer alone would print today's date.

        Raises:
            ScorerFailed: A document has no score from 0 to 1.
        """
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=list(ends), pad_token_id=pad)
        lm: Any = _Arm
        results: Any = evaluate(
            # A rendered template has its own beginning-of-text token, or none.
            lm=lm(
                caches=caches,
                prompt=prompt,
                chat_template_args=dict(template_args or {}),
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                add_bos_token=False if self._params["chat_template"] else None,
            ),
            task_dict=self._loaded,
            limit=self._params["limit"],
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=self._params["chat_template"],
        )
        tasks = self._loaded["tasks"]
        return [
            score
            for name, samples in sorted(results["samples"].items())
            for score in self._scores(tasks[name], samples)
        ]

    def _scores(self, task: Task, samples: Sequence[Mapping[str, Any]]) -> Iterator[DocumentScore]:
        metric, chosen = self._metric(task)
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        chosen = chosen or filters[0]
        if chosen not in filters:
            raise ScorerFailed(f"the task {task.task_name} has no filter `{chosen}`, but {', '.join(filters)}")
        for sample in samples:
            if sample["filter"] != chosen:
                continue
            value = sample.get(metric)
            if not is_share(value):
                raise ScorerFailed(f"{metric} of {task.task_name} gives a document {value!r}, no number from 0 to 1")
            row = f"{task.task_name}/{sample['doc_id']}-{sample['doc_hash'][:8]}"
            yield DocumentScore(row, task.task_name, float(value))


class _Arm(HFLM):
    """A loaded arm as lm_eval asks it: through the arm's own KV cache where that is quantized."""

    def __init__(self, *, caches: Caches | None, prompt: Callable[[Any], str] | None, **more: Any) -> None:
        super().__init__(**more)
        self._caches, self._prompt = caches, prompt

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._prompt is not None and add_generation_prompt:
            return self._prompt(chat_history)
        try:
            with bounds(seconds=SECONDS, mib=MIB):
                return super().apply_chat_template(chat_history, add_generation_prompt)
        except OverBounds as error:
            raise ScorerFailed(f"the chat template takes {error} for one document") from None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._caches is None:
            return super()._model_call(inps, attn_mask, labels)  # pyright: ignore[reportAttributeAccessIssue]  # HFLM is untyped
        with torch.no_grad():
            return self.model(inps, past_key_values=self._caches(), use_cache=True).logits  # pyright: ignore[reportAttributeAccessIssue]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **more: Any) -> Tensor:
        cached = {} if self._caches is None else {"past_key_values": self._caches()}
        return super()._model_generate(context, max_length, stop, **more, **cached)  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    with contextlib.chdir(folder) if folder else contextlib.nullcontext():
        yield


def _refuse(task: Task) -> None:
    """Raise StageError for what no arm can be asked."""
    name = task.task_name
    reasons = {"UNSAFE_CODE": "it runs code that the model writes", "MULTIMODAL": "it shows pictures"}
    for attribute, why in reasons.items():
        if getattr(task, attribute, False):
            raise StageError.of(
                what=f"the task {name} cannot be scored here",
                where="evaluate.scorers, kind lm-eval",
                why=why,
                next="leave it out",
            )


def _render(task: Task) -> None:
    """Raise StageError where the first document cannot be asked: templates and functions of a task are its author's."""
    for document in islice(task.eval_docs, 1):
        try:
            task.doc_to_text(document)
            task.doc_to_target(document)
        except Exception as error:  # the task's own code: it may raise anything, and all of it is reported
            raise _unaskable(task.task_name, error) from error


def _unaskable(task: str, error: Exception) -> StageError:
    return StageError.of(
        what=f"the first document of the task {task} cannot be asked",
        where="evaluate.scorers, kind lm-eval",
        why=f"{type(error).__name__}: {error}",
        next="correct doc_to_text and doc_to_target of the task: they name columns of its documents",
    )


def _unknown(near: Mapping[str, str]) -> StageError:
    guesses = [name for name in near.values() if name]
    return StageError.of(
        what=f"lm-evaluation-harness has no task {', '.join(near)}",
        where="evaluate.scorers, kind lm-eval",
        why="neither a task nor a group or tag bears that name",
        next=f"did you mean {', '.join(guesses)}?" if guesses else "`.venv/bin/lm-eval ls tasks` lists all names",
    )


def _not_here(names: Sequence[str], error: Exception) -> StageError:
    """The library found the task and could not load it: as a rule its data set is on a hub."""
    listed = ", ".join(map(repr, names))
    return StageError.of(
        what=f"the lm-eval task(s) {', '.join(names)} cannot be loaded",
        where="evaluate.scorers, kind lm-eval",
        why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}; jobs read what "
        "is on this machine and fetch nothing",
        next="fetch the data set once, with a network: "
        f'.venv/bin/python -c "from lm_eval.tasks import TaskManager; TaskManager().load([{listed}])"; '
        "or name a YAML task with `data_files` by `include:`",
    )
