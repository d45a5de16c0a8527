"""A model of a hub without its weights: config, tokenizer, and the headers of its safetensors files.

Some 100 kB are read of each file of weights. What is written stands in for the model wherever only headers are read:
the weights are holes in the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download  # pyright: ignore[reportUnknownVariableType]
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from huggingface_hub.utils import SafetensorsFileMetadata

from tasks.runtime.hub import fetch
from tasks.runtime.hub.fetch_problems import Pinned, fetch_problem, is_cached
from tasks.runtime.hub.ids import HubId, Snapshot
from tasks.runtime.hub.repository import explained
from tasks.runtime.tokenizer_files import copy_files

AT_ONCE = 8  # requests; a 70B has 30 files


def headers_only(hub: HubId, folder: Path) -> Snapshot:
    """See `tasks.runtime.pin.headers_only`."""
    small = fetch.snapshots([replace(hub, kind="tokenizer")])[0]
    commit = small.source.rpartition("@")[2]
    pinned = Pinned(commit=commit, files=None)
    with explained(
        partial(fetch_problem, hub, pinned), *fetch.ERRORS, NotASafetensorsRepoError, SafetensorsParsingError
    ):
        files = fetch.wanted(hub, commit)
        if all(is_cached(hub, commit, name) for name in files):
            return fetch.whole(hub, Pinned(commit=commit, files=files))
        folder.mkdir(parents=True, exist_ok=True)
        copy_files(small.folder, folder, fetch.PATTERNS["tokenizer"])
        for name in files:
            if name.endswith(".index.json"):
                shutil.copyfile(hf_hub_download(hub.name, name, revision=commit), folder / name)
        weights = [name for name in files if name.endswith(".safetensors")]
        for name, header in zip(weights, _headers(hub.name, commit, weights), strict=True):
            _write(folder / name, header)
    return Snapshot(folder=folder, source=small.source)


def _headers(name: str, commit: str, files: Sequence[str]) -> list[SafetensorsFileMetadata]:
    read = partial(HfApi().parse_safetensors_file_metadata, name, revision=commit)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(read, files))


def _write(path: Path, header: SafetensorsFileMetadata) -> None:
    """A safetensors file of this header; its tensors are a hole that takes no disk."""
    entries = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for name, tensor in header.tensors.items()
    }
    raw = json.dumps(entries).encode()
    end = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
