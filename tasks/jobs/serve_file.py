"""serve.json and serve.md of an artifact, written by the job that makes it, as its last files."""

from __future__ import annotations

from pathlib import Path

from recipes.models.headers import read_headers
from recipes.problem import RecipeError
from recipes.schemes.scheme import Scheme
from recipes.schemes.serve_file import describe, write
from tasks.runtime.process.errors import StageError


def write_serve_file(out: Path, *, name: str, model: Path, scheme: Scheme | None) -> None:
    """Say how what was written is served.

    Args:
        out: Gets serve.json and serve.md.
        name: Of the artifact.
        model: Folder of the same model in bf16, with its tokenizer; `out` itself where nothing is quantized.
        scheme: How it was quantized, or None.

    Raises:
        StageError: The model's folder cannot be read.
    """
    try:
        headers = read_headers(model)
    except RecipeError as error:
        raise StageError(error.problems[0]) from error
    write(out, describe(headers, name=name, scheme=scheme))
