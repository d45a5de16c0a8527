"""All scorers of a recipe on one set of answers, and what happens to an answer that a scorer cannot judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from recipes.problem import Problem
from recipes.scorers import input_name
from tasks.jobs.measuring.answers import NO_ANSWER, Answer, AnswerReader
from tasks.jobs.measuring.decoding import Decoded, before_end, greedy_config
from tasks.jobs.measuring.teacher_forcing import Caches, TokenRow
from tasks.jobs.measuring.tiles import Model
from tasks.jobs.scorers import Scorer, ScorerFailed, Verdict, make_scorer
from tasks.jobs.text.chat_template import NO_SETTINGS, ChatTemplate, TemplateSettings
from tasks.jobs.text.conversation import Conversation, RowError
from tasks.jobs.text.thinking import Thinking
from tasks.jobs.text.tokenizer import load_tokenizer
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job

if TYPE_CHECKING:
    from tasks.jobs.scorers.harness import Harness  # importing lm_eval takes 2 s

ROUNDING = 1e-9  # of a score of 1 that a function computes
SHOWN = 20  # rows that are named
SHOWN_CHARS = 200  # of an answer
STEP = 16  # tokens: limits that are proposed are multiples of it, so that a row a little longer does not end a retrain


class Grader(NamedTuple):
    """A scorer under the metric that its scores are."""

    name: str
    metric: str
    score: Scorer


class Graders(NamedTuple):
    """The recipe's scorers: those of the rows' answers, and by metric the lm-eval tasks, which have documents."""

    answers: list[Grader]
    harnesses: dict[str, Harness]


class Graded(NamedTuple):
    """The scorers' verdicts on the answers.

    Attributes:
        scores: Metric -> (row, score); without a metric whose scorer failed.
        verdicts: `score`, `error` and `scores` of answers.parquet, in the order of the answers.
        problems: Metric -> why it has no scores.
    """

    scores: dict[str, list[tuple[TokenRow, float]]]
    verdicts: list[dict[str, Any]]
    problems: dict[str, Problem]


def open_graders(job: Job) -> Graders:
    """The scorers of a job's params, in their order; the first one's metric is `task`.

    Raises:
        StageError: One cannot be loaded.
    """
    graders = Graders([], {})
    for number, params in enumerate(job.params["scorers"]):
        content = job.optional(input_name(number))
        metric = f"task.{params['name']}" if number else "task"
        if params["kind"] == "lm-eval":
            graders.harnesses[metric] = _harness(params, content)
        else:
            graders.answers.append(Grader(params["name"], metric, make_scorer(params, content)))
    return graders


def _harness(params: Mapping[str, Any], include: Path | None) -> Harness:
    from tasks.jobs.scorers.harness import Harness

    return Harness(params, include)


def refuse_references(rows: Sequence[TokenRow], graders: Sequence[Grader], prompting: Prompting) -> None:
    """Raise StageError where the data's own answer is missing or would score less than 1."""
    if not rows:
        return
    thinking = prompting.reader().thinking
    unanswered = [row.row for row in rows if not row.answer.strip() or thinking.begins(row.answer)]
    if unanswered:
        raise StageError.of(
            what=f"{len(unanswered)} row(s) of dev and test have no reference answer",
            where=f"rows {', '.join(unanswered[:SHOWN])}",
            why="their last turn is empty, or thinking that never ends: there is nothing to compare a model's answer "
            "with",
            next="write their last turn's answer, or remove these rows",
        )
    for grader in graders:
        said = {row.row: thinking.behind_text(row.answer) for row in rows}
        wrong = {row.row: why for row in rows if (why := _below_1(grader, said[row.row], row))}
        if wrong:
            raise _rejects(grader, wrong)


def refuse_long(rows: Sequence[TokenRow], prompting: Prompting, *, max_new_tokens: int) -> int:
    """Tokens of the longest reference answer, its thinking and its end included; 0 without rows.

    Raises:
        StageError: A model that says a reference, token by token, would be cut off.
    """
    tokens = {row.row: prompting.reference_size(row) for row in rows}
    longest = max(tokens.values(), default=0)
    long = [row for row, size in tokens.items() if size > max_new_tokens]
    if long:
        enough = STEP * -(-longest // STEP)
        raise StageError.of(
            what=f"{len(long)} of {len(rows)} reference answers of dev and test are longer than "
            f"evaluate.max_new_tokens, {max_new_tokens}",
            where=f"rows {', '.join(long[:SHOWN])}",
            why=f"the longest has {longest} tokens with the one that ends it; an arm that answers as the data says "
            "would be cut off there, and an answer without an end scores 0",
            next=f"write `max_new_tokens: {enough}` under `evaluate:`, or --set evaluate.max_new_tokens={enough}; or "
            "remove these rows",
        )
    return longest


def refuse_decoded(rows: Sequence[TokenRow], graders: Sequence[Grader], prompting: Prompting) -> None:
    """Raise StageError where a model that says the reference, token by token, would score less than 1.

    That is so where the tokenizer gives another text back than it got (lower case, other spaces, a special token in an
    answer), whatever is trained.

    Args:
        rows: Rows with a prompt, whose references score 1.
        graders: The scorers.
        prompting: The dataset's tokenizer.
    """
    if not rows:
        return
    reader = prompting.reader()
    answers = {row.row: reader.read(row, Decoded(prompting.reference_tokens(row), ended=True)) for row in rows}
    unended = [row for row, answer in answers.items() if answer.ending != "finished"]
    if unended:
        raise _never_end(unended, reader.thinking, of=len(rows))
    for grader in graders:
        wrong: dict[str, str] = {}
        for row in rows:
            text, said, _ = answers[row.row]
            if text != row.answer and (why := _below_1(grader, said, row)):
                wrong[row.row] = f"{why}; the data has {_shown(row.answer)}, its tokens are {_shown(text)}"
        if wrong:
            raise _not_given_back(grader, wrong)


def _below_1(grader: Grader, said: str, row: TokenRow) -> str:
    """Why this text is no right answer to the row; empty where it is one."""
    try:
        verdict = grader.score(said, row.answer, row.columns)
    except ScorerFailed as error:
        return str(error) or "the scorer failed"
    return "" if verdict.score >= 1 - ROUNDING else verdict.error or f"it scores {verdict.score:g}"


def _never_end(rows: Sequence[str], thinking: Thinking, *, of: int) -> StageError:
    opening, closing, _ = thinking.marks[0]
    return StageError.of(
        what=f"{len(rows)} of {of} reference answers of dev and test are thinking that never ends",
        where=f"rows {', '.join(rows[:SHOWN])}",
        why=f"prompt or answer opens it with {opening}, and no {closing} follows; a model that learns this gives no "
        "answer, and scores 0",
        next=f"write {closing} before these answers (or give the thinking as `reasoning_content`), or let the template "
        "open none: many take `template_args: {enable_thinking: false}` under `model:`",
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} ...")


def _rejects(grader: Grader, wrong: Mapping[str, str]) -> StageError:
    first = next(iter(wrong))
    return StageError.of(
        what=f"the scorer {grader.name} rejects the reference answers of {len(wrong)} row(s)",
        where=f"rows {', '.join(list(wrong)[:SHOWN])}",
        why=f"an arm that answers as the data says would be counted as wrong ({first}: {wrong[first]})",
        next="correct these rows, or choose another entry of evaluate.scorers",
    )


def _not_given_back(grader: Grader, wrong: Mapping[str, str]) -> StageError:
    first = next(iter(wrong))
    return StageError.of(
        what=f"the base's tokenizer changes the reference answers of {len(wrong)} row(s), so that the scorer "
        f"{grader.name} rejects them",
        where=f"rows {', '.join(list(wrong)[:SHOWN])}",
        why=f"an arm that gives these answers token by token would be counted as wrong ({first}: {wrong[first]})",
        next="take special tokens out of these answers, or choose an entry of evaluate.scorers that lets such changes "
        "pass (a python scorer), or another base",
    )


def grade(rows: Sequence[TokenRow], answers: Sequence[Answer], graders: Sequence[Grader]) -> Graded:
    """Score every answer by every scorer. One without an end scores 0; no scorer is asked.

    A scorer that fails on one answer has no scores at all: a mean over the others would be of an easier set.

    Args:
        rows: The rows that were asked.
        answers: What was answered, in the same order.
        graders: The scorers; the first one's score is `score` of answers.parquet.
    """
    graded = Graded({}, [{"score": None, "error": None} for _ in rows], {})
    by_scorer: list[dict[str, dict[str, Any]]] = [{} for _ in rows]  # of each answer
    for grader in graders:
        failed: list[tuple[TokenRow, str, str]] = []
        scores: list[tuple[TokenRow, float]] = []
        for row, answer, verdicts in zip(rows, answers, by_scorer, strict=True):
            try:
                verdict = _verdict(grader, answer, row)
            except ScorerFailed as error:
                failed.append((row, answer.text, str(error)))
                verdicts[grader.name] = {"score": None, "error": str(error)}
            else:
                scores.append((row, verdict.score))
                verdicts[grader.name] = {"score": verdict.score, "error": verdict.error}
        if failed:
            graded.problems[grader.metric] = _failed(grader, failed, of=len(rows))
        else:
            graded.scores[grader.metric] = scores
    for line, verdicts in zip(graded.verdicts, by_scorer, strict=True):
        line |= {**next(iter(verdicts.values()), {}), "scores": json.dumps(verdicts, ensure_ascii=False)}
    return graded


def _verdict(grader: Grader, answer: Answer, row: TokenRow) -> Verdict:
    if answer.ending != "finished":
        return Verdict(0.0, NO_ANSWER[answer.ending])
    return grader.score(answer.said, row.answer, row.columns)


def _failed(grader: Grader, failed: Sequence[tuple[TokenRow, str, str]], *, of: int) -> Problem:
    row, text, why = failed[0]
    return Problem(
        what=f"the scorer {grader.name} failed on {len(failed)} of {of} answers",
        where=f"row {row.row}, answer {_shown(text)}",
        why=why,
        next="make the scorer return 0 for what it cannot read, and run again: only evaluate steps are made again",
    )


class Prompting(NamedTuple):
    """How documents become prompts.

    Attributes:
        tokenizer: With its template.
        ends: Token ids that end an answer.
        settings: What the recipe says to the template.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: list[int]
    settings: TemplateSettings = NO_SETTINGS

    @classmethod
    def of(cls, folder: Path) -> Prompting:
        """As for the rows, with the dataset's tokenizer."""
        ends = greedy_config(folder, max_new_tokens=1).eos_token_id
        return cls(load_tokenizer(folder), ends, TemplateSettings.read(folder))

    def prompt(self, turns: list[dict[str, str]]) -> str:
        """A history with the generation prompt, on the day that the rows were rendered with.

        Raises:
            ScorerFailed: The template refuses it.
        """
        template = ChatTemplate.of(self.tokenizer, settings=self.settings)
        try:
            return template.text(Conversation(turns=list(turns)), prompted=True)
        except RowError as error:
            raise ScorerFailed(str(error)) from None

    def reader(self) -> AnswerReader:
        """Reads what a model that was asked so has answered; the tokenizer has a template."""
        template = ChatTemplate.of(self.tokenizer, settings=self.settings)
        return AnswerReader(tokenizer=self.tokenizer, thinking=Thinking.of(template))

    def reference_tokens(self, row: TokenRow) -> list[int]:
        """Tokens of a model's answer that is the row's reference, thinking included, without the end."""
        tokenizer: Any = self.tokenizer
        begins = row.ids[: len(row.prompt_ids)] == row.prompt_ids
        tokens = row.ids[len(row.prompt_ids) :] if begins else tokenizer(row.answer, add_special_tokens=False).input_ids
        return before_end(tokens, self.ends)

    def reference_size(self, row: TokenRow) -> int:
        """How many these are, with the one that ends them."""
        return len(self.reference_tokens(row)) + 1


def run_harnesses(
    model: Model, harnesses: Mapping[str, Harness], job: Job, *, prompting: Prompting, caches: Caches | None = None
) -> tuple[list[dict[str, Any]], dict[str, Problem]]:
    """Lines of scores.parquet of all lm-eval tasks (split `test`), and what went wrong, by metric."""
    lines: list[dict[str, Any]] = []
    problems: dict[str, Problem] = {}
    size = job.params["batch_size"]
    for metric, harness in harnesses.items():
        try:
            documents = harness.run(
                model,
                prompting.tokenizer,
                ends=prompting.ends,
                batch_size=size,
                caches=caches,
                template_args=prompting.settings.args,
                prompt=prompting.prompt if prompting.settings.day else None,
            )
        except ScorerFailed as error:
            problems[metric] = Problem(
                what=f"no score of {metric}",
                where=metric,
                why=str(error),
                next="name another `metric:` of its tasks, or leave them out",
            )
            continue
        for document in documents:
            place = {"row": document.row, "group": document.row, "split": "test", "domain": document.task}
            lines.append({**place, "metric": metric, "sum": document.score, "n": 1})
    return lines, problems
