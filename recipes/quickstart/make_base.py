"""Trains the quickstart's base model from scratch: a 5.8 M-parameter Llama that has read Python docstrings.

The text is on every machine where the lock is installed: docstrings of the standard library, and of numpy,
pandas and networkx. A part of the standard library's files is held out and never read: it becomes the general
text that shows what fine-tuning makes the model forget. About 30 minutes on one CPU thread:

    python recipes/quickstart/make_base.py

Writes base/ (the model), data/general.jsonl and data/general_calibration.jsonl next to this file.
"""

import ast
import hashlib
import itertools
import json
import math
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model is no faster on two

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PACKAGES = ("numpy", "pandas", "networkx")  # BSD-3-Clause; the versions are the lock's
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 4096
SEED, STEPS, BATCH, LENGTH, PEAK_LR = 7, 1650, 16, 256, 2e-3
HELD_OUT_ROWS, HELD_OUT_ROW_TOKENS = 180, range(100, 401)

# ChatML. {% generation %} marks what a fine-tune learns: an assistant's turn and the <|im_end|> that ends it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


class Docstring(NamedTuple):
    """Where a docstring stands, what it documents, and its text."""

    file: str  # relative to the standard library or to site-packages
    name: str  # dotted, as in "json.decoder.JSONDecoder.decode"
    text: str


def docstrings(root: Path, pattern: str) -> Iterator[Docstring]:
    """Yields the docstrings of the files under `root` that match, tests and installed packages left out."""
    for path in sorted(root.glob(pattern)):
        file = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests"} & set(file.parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # lib2to3 ships such files on purpose
            continue
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        yield from _docstrings_of(tree, str(file), module)


def _docstrings_of(node: ast.AST, file: str, name: str) -> Iterator[Docstring]:
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if documented and (text := ast.get_docstring(node)):
        yield Docstring(file, name, text)
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None)
        yield from _docstrings_of(child, file, f"{name}.{inner}" if isinstance(inner, str) else name)


def unit_hash(text: str) -> float:
    """Maps `text` to [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def is_held_out(doc: Docstring) -> bool:
    """Says whether a docstring is of the three tenths of the standard library that the model never reads."""
    return Path(doc.file).parts[0] not in PACKAGES and unit_hash(f"held out:{doc.file}") < 0.3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE in which every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def document(doc: Docstring, tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns one training text: the docstring or, one time in four, a chat about its first paragraph."""
    if unit_hash(f"chat:{doc.text}") >= 0.25:
        return doc.text + "<|endoftext|>"
    question = {"role": "user", "content": f"What is {doc.name}?"}
    answer = {"role": "assistant", "content": doc.text.split("\n\n")[0]}
    return tokenizer.apply_chat_template([question, answer], tokenize=False) + "<|endoftext|>"


def write_held_out(docs: list[Docstring], tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the held-out docstrings of fitting length; those of one file all go to the same output."""
    rows: dict[str, list[str]] = {"general": [], "general_calibration": []}
    for doc in sorted(docs, key=lambda doc: unit_hash(doc.text)):
        if len(tokenizer(doc.text)["input_ids"]) in HELD_OUT_ROW_TOKENS:
            name = "general" if unit_hash(f"part:{doc.file}") < 0.5 else "general_calibration"
            rows[name].append(json.dumps({"text": doc.text, "source": f"{doc.file}:{doc.name}"}))
    (HERE / "data").mkdir(exist_ok=True)
    for name, lines in rows.items():
        (HERE / f"data/{name}.jsonl").write_text("\n".join(lines[:HELD_OUT_ROWS]) + "\n")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the untrained model; its sizes are multiples of 128, as groups of quantized weights want."""
    end, stop = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=stop, pad_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[stop, end], pad_token_id=end)
    return model


def learning_rate(step: int) -> float:
    """Warms up over 100 steps, then follows a cosine down to a twentieth of the peak."""
    if step < 100:
        return PEAK_LR * (step + 1) / 100
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))))


def train(model: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """Trains on random windows of `tokens`, one long row of ids."""
    matrices = {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1}
    norms = {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, norms], lr=PEAK_LR, betas=(0.9, 0.95))
    chooser = torch.Generator().manual_seed(SEED)
    progress = tqdm(range(STEPS), unit="step", mininterval=5)
    for step in progress:
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=chooser)
        batch = torch.stack([tokens[s : s + LENGTH] for s in starts])  # [BATCH, LENGTH]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def main() -> None:
    """Collects the text, trains the tokenizer and the model, and writes them."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)

    stdlib, site_packages = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    found = [
        docstrings(stdlib, "**/*.py"),
        *(docstrings(site_packages, f"{name}/**/*.py") for name in PACKAGES),
    ]
    unique: dict[str, Docstring] = {}
    for doc in itertools.chain(*found):
        unique.setdefault(doc.text, doc)
    held_out = [doc for doc in unique.values() if is_held_out(doc)]
    docs = [doc for doc in unique.values() if not is_held_out(doc)]
    tokenizer = train_tokenizer([doc.text for doc in docs])
    write_held_out(held_out, tokenizer)
    random.Random(SEED).shuffle(docs)
    texts = [document(doc, tokenizer) for doc in docs]
    tokens = torch.cat([torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]])
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
    print(f"corpus: {len(docs)} docstrings, {len(tokens)} tokens, sha256 {digest}")

    model = new_model(tokenizer)
    train(model, tokens)
    model.to(torch.bfloat16).save_pretrained(HERE / "base")
    tokenizer.save_pretrained(HERE / "base")


if __name__ == "__main__":
    main()
