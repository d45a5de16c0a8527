"""The renderer that a job's parameters ask for, and the refusal of rows that it cannot render."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.data.rows import first_lines
from tasks.jobs.preparing.spool import SpooledRow
from tasks.jobs.text.chat_template import TemplateSettings
from tasks.jobs.text.rendering import Renderer
from tasks.jobs.text.seams import remedy
from tasks.runtime.process.errors import StageError
from tasks.runtime.process.job import Job


def open_renderer(job: Job) -> Renderer:
    """The base's tokenizer with the chat template, its arguments and its day.

    Raises:
        StageError: They do not go together, or there is no template.
    """
    template = job.params.get("chat_template")
    if "template" in job.inputs:
        template = job.inputs["template"].path.read_text(encoding="utf-8")
    settings = TemplateSettings.of(job.params.get("template_args"), job.params.get("template_date"))
    renderer = Renderer.open(job.inputs["tokenizer"].path, template=template, settings=settings)
    renderer.check_settings()
    return renderer


def unsound(lines: Sequence[str], renderer: Renderer, *, count: int, seam: SpooledRow | None) -> StageError:
    """Rows without a sound mask.

    Args:
        lines: `file.jsonl:LINE what is wrong with it`, the first ones.
        renderer: Renders them.
        count: Rows in all.
        seam: One of them whose prompt is no beginning of what is trained.
    """
    return StageError.of(
        what=f"{count} row(s) are not rendered whole, or their completions cannot be found among the tokens",
        where=lines[0].split(" ", 1)[0],
        why="something would be lost, or the loss would fall on the wrong tokens:" + first_lines(lines, count=count),
        next=remedy(renderer, seam.messages, seam.tools)
        if seam
        else "correct these rows, or use a chat template that has a place for all of them",
    )
