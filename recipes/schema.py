"""The recipe: one frozen model per section. The string under a field is its documentation.

`model`, `data`, the entries of `quantize.schemes` and those of `evaluate.scorers` have files of their own:
models/schema.py, data/schema.py, schemes/schema.py and scorers.py. docs/recipe.md is generated from all of them.

Everything but `gate:`, `promote:`, `serve:` and `run:` is identity: changing it changes fingerprints. `run:` is
execution: where and how. Validators check, they never edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recipes.data.schema import Data
from recipes.models.schema import Model
from recipes.schemes.schema import SchemeSpec
from recipes.scorers import ExactMatchSpec, LmEvalSpec, Scorer
from recipes.section import Place, Section

LEAST_ROWS, MOST_ROWS = 128, 512  # of a calibration set; Calibrate says why
FEWEST_ROWS = 32  # of train, whatever is allowed
TOKENS_PER_INPUT = 4  # calibration tokens per input of the widest layer: with fewer its Hessian is badly estimated


class Train(Section):
    adapter: Place | None = None
    """LoRA adapter that was trained before, by any PEFT-based tool: a local folder or a hub id. Nothing is trained
    then, so no other field may stand beside it."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """LoRA rank r."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA alpha; the update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """LoRA dropout."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter, by the last part of their names. Of a base with towers (images, audio) only those of
    its text decoder do."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    """Another rank for some modules, as in PEFT: by the end of a module's name, or a regular expression for it."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Another alpha for some modules, by the same keys."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead of alpha / r (rank-stabilised LoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA, arXiv:2402.09353); slower."""
    modules_to_save: list[str] = []
    """Modules trained in full and saved with the adapter: embeddings, output layer, norms. A name stands for every
    module whose name ends with it (`norm` also for input_layernorm). Layers that training quantizes cannot be named."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps with rising learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient norm is clipped to this."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimizer step, over all devices. Accumulation follows from `run.micro_batch`."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over train; ignored where max_steps is set."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides epochs."""
    packing: bool = False
    """Put the rows of a forward pass into one sequence, without padding; each row sees only itself. A step has the same
    rows either way, so the curve is the same. Pays with `attention: flash_attention_2`; with the others attention costs
    the square of that sequence."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of training; flash_attention_2 needs an NVIDIA GPU and the package flash-attn."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between dev losses; default: four dev losses per training."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Training ends after so many dev losses in a row without a new best."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the adapter: the last ones or those with the lowest dev loss."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between checkpoints; a killed training resumes from the last one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    accept_unquantized: bool = False
    """Train although more than 5 % of the linear weights stay bf16 (experts of mixture models): they take memory."""

    def adapts(self, name: str) -> bool:
        """True where the linear layer of this full name gets an adapter."""
        return self.targets == "all-linear" or name.rpartition(".")[2] in self.targets

    seed: int = 0
    """Initialisation, data order, dropout."""


class Merge(Section):
    base: Literal["dequantized", "original", "auto"] = "dequantized"
    """Merge that the schemes quantize: into the NF4 weights that were trained, dequantized, or the original ones.
    `auto` takes the one with the lower loss on dev, the dequantized one when the two cannot be told apart."""
    accept_other_base: bool = False
    """Merge although the base's NF4 weights are not those of the training record (another base or arithmetic)."""


class Calibrate(Section):
    rows: Annotated[int, Field(ge=1)] = 256
    """Source rows from train, 128 to 512: fewer starve the Hessian, more only cost time."""
    allow_unusual_size: Annotated[str, Field(min_length=1)] | None = None
    """A reason to have fewer than 128 or more than 512 rows, as `train has 90 rows`. It stands in the log, the manifest
    and the report. The tokens that the widest layer needs (4 per input) are needed all the same, and train has to have
    32 rows."""
    seq_len: Annotated[int, Field(ge=32)] = 512
    """Tokens per sequence: rows are packed up to this length, and never cut inside a completion."""
    stratify: Literal["proportional", "equal"] | dict[str, Annotated[float, Field(gt=0, le=1)]] = "proportional"
    """How rows are shared out over the domain column: in its proportions, equally, or by shares `{domain: share}` that
    sum to 1 (a domain that is not named gives none). Within a domain they come in equal parts from its short, middle
    and long rows (terciles by tokens)."""
    max_near_duplicates: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of train that may leak: near-twins of a row of dev or test (Jaccard similarity of 5-grams of prompt and
    completion 0.9 or more), and rows that share an answer with all turns before it with one. More are refused before
    anything is trained, and `quench check --data` says how many there are. The same share of the calibration rows may
    be near-twins; near_twins.jsonl of the artifact lists them."""
    controls: list[str] = []
    """Schemes of `quantize.schemes` that are also made with other calibration, as arms of their own:
    `SLUG.calib-generic` (general text), `.calib-mixed` (half and half), `.calib-random` (random token ids), rounding to
    nearest with the same bits and groups (no calibration), and for AWQ `.scales-from-base` (scales and clipping found
    on the base). The report says whether calibration mattered."""
    general: Place | None = None
    """File with a column `text`, as `data.general`: the generic calibration text of `controls`. None of them may be in
    `data.general`, which is evaluated."""
    seed: int = 0
    """Draws the rows."""

    @model_validator(mode="after")
    def _rows_in_range(self) -> Calibrate:
        if not LEAST_ROWS <= self.rows <= MOST_ROWS and self.allow_unusual_size is None:
            raise ValueError(
                f"calibrate.rows is {self.rows}; it has to be 128 to 512: below 128 the Hessian of a wide layer is "
                "not of full rank and scales follow single rows; above 512 figures no longer change, only time does; "
                "`allow_unusual_size: REASON` allows it"
            )
        return self

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> Calibrate:
        if isinstance(self.stratify, dict) and abs(sum(self.stratify.values()) - 1) > 1e-6:
            raise ValueError(
                f"calibrate.stratify has shares that sum to {sum(self.stratify.values()):g}: all rows are shared out, "
                "so they have to sum to 1"
            )
        return self

    @model_validator(mode="after")
    def _controls_have_text(self) -> Calibrate:
        if self.controls and self.general is None:
            raise ValueError("calibrate.general is missing: `controls` calibrate on general text, too")
        return self


class Quantize(Section):
    schemes: list[str | SchemeSpec] = ["awq-w4-g128", "gptq-w4-g128"]
    """Scheme slugs (METHOD-wBITS-gGROUP: rtn, gptq, awq, ct-gptq, ct-awq; nf4, int8; `quench schemes` lists them), or a
    slug with a backend, rules or a name of its own."""
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """GPTQ: share of the mean Hessian diagonal that is added to the diagonal."""
    seed: int = 0
    """Seed of the quantizer."""
    accept_unquantized: bool = False
    """Make a scheme that leaves more than 5 % of the linear weights in bf16 (experts of mixture models): its files are
    hardly smaller than the base. `quench check` says how many GiB."""


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]


class ExternalModel(Section):
    path: Place
    """A model folder or a hub id (`org/name`)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); pinned to a commit when the run starts."""
    chat_template: Literal["chatml"] | None = None
    """Only for a model whose tokenizer has no chat template, and is another one than the base's."""
    trust_remote_code: bool = False
    """Run the Python that comes with a model whose type transformers does not have (`auto_map` in its config.json). A
    hub id then needs a commit as `revision`, and whoever starts the run has to allow it: `--allow-python ORG/NAME`. Its
    tokenizer has to do without code of its own."""


class Evaluate(Section):
    scorers: Annotated[list[Scorer], Field(min_length=1)] = [ExactMatchSpec()]
    """How the last turn's answer, decoded greedily from its true history, is scored. All of them score the same
    answers: the first one is the metric `task`, which ranks, and every other one `task.NAME`. docs/scorers.md."""
    on_base: list[str] = []
    """Schemes that are also applied to the base, with the adapter on top (arms `SLUG.on-base`)."""
    kv_cache: list[str] = []
    """Arms that are also evaluated with a quantized KV cache: `ARM.kv-fp8` (e4m3, scale 1), `ARM.kv-fp8-calibrated`
    (e4m3, one scale for the keys and one for the values of a layer, from the calibration set), `ARM.kv-int8` (one scale
    per token and head). Simulated: attention reads what such a cache would give back, in bf16; nothing gets smaller or
    faster."""
    external: dict[Name, Place | ExternalModel] = {}
    """Models from elsewhere that join the matrix under a name: what is in production now, a checkpoint of another tool,
    a bigger model as yardstick. A folder or hub id that transformers loads: in bf16, fp16 or fp32, or quantized as its
    config.json says. Write a section where it needs a revision or a template. A model with another tokenizer is scored
    with its own template and compared by task score and bits per byte."""
    reference: Name | None = None
    """External model that KL and top-1 agreement are measured against, in place of nf4-adapter; it has to have the
    base's tokenizer."""
    null_arms: Literal["auto"] | list[Literal["batch", "threads", "attention"]] = "auto"
    """Arms that compute merged-dequantized once more in another way, to show how much of a difference is noise of
    arithmetic: with half the batch size (`batch`), another number of CPU threads (`threads`), eager attention
    (`attention`). Each costs about what any arm costs. `auto`: one for every seven others, so that they keep to an
    eighth of the evaluation; first `batch`, then on a CPU `threads`, on a GPU `attention`. docs/report.md."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer that is decoded, in tokens with the one that ends it. One that is cut off there scores 0."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per forward pass, equal for all arms: sums in bf16 depend on it a little."""
    reference_gib: Annotated[float, Field(gt=0)] = 4.0
    """Size limit of the stored reference logits; a seeded sample of whole rows where not all rows fit."""
    seed: int = 0
    """Draws the sample of rows for KL."""

    @model_validator(mode="after")
    def _scorers_apart(self) -> Evaluate:
        names = [scorer.called for scorer in self.scorers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"evaluate.scorers has {', '.join(twice)} twice: scores are published as task.NAME, so one of them "
                "needs another `name:`"
            )
        if isinstance(self.scorers[0], LmEvalSpec):
            raise ValueError(
                "evaluate.scorers begins with lm-eval: the first scorer is `task`, which ranks arms and is read on "
                "dev, where lm-eval has no documents; write one of the rows' answers before it (`- kind: exact-match`)"
            )
        return self

    @property
    def externals(self) -> dict[str, ExternalModel]:
        """External models by name, each as a section."""
        return {
            name: model if isinstance(model, ExternalModel) else ExternalModel(path=model)
            for name, model in self.external.items()
        }

    @model_validator(mode="after")
    def _reference_is_external(self) -> Evaluate:
        if self.reference is not None and self.reference not in self.external:
            raise ValueError(
                f"evaluate.reference names {self.reference}, which is no external model: `evaluate.external` has "
                f"{', '.join(self.external) or 'none'}; without evaluate.reference it is nf4-adapter"
            )
        return self


class Measure(Section):
    enabled: bool = True
    """Measure load time and tokens/s of every arm, alone on the machine."""
    batch: Annotated[int, Field(ge=1)] = 1
    """Sequences at once."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 128
    """Context of the prefill."""
    new_tokens: Annotated[int, Field(ge=2)] = 32
    """Tokens decoded after it."""
    repeats: Annotated[int, Field(ge=5)] = 5
    """Timed repeats, after one that is not timed."""


class Gate(Section):
    """What a candidate may lose on test and still be promoted. Decides no bytes: nothing is made again when it changes.

    Compared with the merged bf16 model that it was made from, with the present champion, and with the best version
    before it. A test is passed where its whole interval lies within the margin: at 95 % where these rows judge their
    first candidate, see `looks`.
    """

    task: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the answers, for every scorer: 0.02 is 2 points. Less than users notice, and about what 500 test rows
    can resolve where 1 answer in 20 changes."""
    loss: Annotated[float, Field(gt=0)] = 0.02
    """Nats per token on completions of test: 2 % more perplexity. What 4 bits usually cost is below it, what a broken
    scale costs far above."""
    general_loss: Annotated[float, Field(gt=0)] = 0.05
    """Nats per token on the general hold-out. Wider: it is not what the model is for, and every training moves it."""
    domain_task: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """As `task`, within each domain of 200 test rows or more (others are shown and gate nothing). Wider, since a slice
    has fewer rows: 200 of them can resolve 5 points, not 2."""
    domain_loss: Annotated[float, Field(gt=0)] = 0.05
    """As `loss`, within each such domain."""
    better_than_base: bool = True
    """The candidate also has to be better than the untouched base at the task (at the loss, where rows have no prompt):
    the interval of the difference leaves out zero."""
    looks: Annotated[int, Field(ge=1)] = 52
    """Candidates of one model name that the same rows of test may judge: a year of weekly retrains. Whoever tries again
    and again passes in the end by luck. So the first is decided at 95 % and the others at a level (99.9 % for 52) that
    leaves a candidate that is too bad 5 % in all to pass once. What comes after them is undecided: new rows of test are
    needed (`data.salt`, or rows that came since)."""


class Promote(Section):
    """Which arm `quench promote` takes, and where to. Decides no bytes."""

    prefer: str | None = None
    """Arm to promote: a scheme of `quantize.schemes` or a merged model. Default, decided on dev before a score of test
    is read: among the schemes that serve.engine serves and that are within the gate's margins on dev, the fewest bytes,
    then the higher task score."""
    model_name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")] | None = None
    """Name in the model registry; each name has a champion of its own. Default: the recipe's name."""


class Serve(Section):
    """Where the result is to be served. Decides no bytes of any model: only `serve` steps are made again for it."""

    engine: Literal["vllm", "transformers", "exllamav2", "onnxruntime-genai", "none"] = "none"
    """What serves the result. A scheme that it cannot read gets a warning from `quench check` and a mark in the report,
    and is never promoted. With `vllm` and its environment (`make env-vllm`) the arms are also served: the rows of test
    are asked of a real server, and what it answers is compared with the arm's own figures. `onnxruntime-genai` (`make
    env-onnx`) does the same on any CPU with AVX2: it serves GPTQ and AWQ files of 4 bits where vLLM asks for AVX-512.
    `none`: nothing is known about it."""
    arms: Literal["default"] | list[str] = "default"
    """Arms that are served. `default`: every scheme that may become the candidate, and the merged model that it is made
    from. A list: these alone; a candidate that is not among them is not promoted. merged-dequantized is always served:
    no quantization lies between the two engines there, so that its difference is the floor for all others."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """GPUs that each layer is split over (vLLM's --tensor-parallel-size)."""
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """Tokens of prompt and answer in the serve command; default: the longest context of the base."""


class RunSettings(Section):
    """Execution only: nothing here changes a fingerprint."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where a GPU is visible."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of a step that may run beside others; default: 1 on CPU, 4 on CUDA."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Rows per forward pass in training; times `processes` it has to divide train.batch_size."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Processes that train together, one per GPU; they share train.batch_size."""
    launcher: Literal["ddp", "fsdp-qlora"] = "ddp"
    """How the processes share the base (infra/accelerate/): `ddp` has all of it in each, `fsdp-qlora` (CUDA) a part."""
    time_limit_s: Annotated[int, Field(ge=1)] | None = None
    """A step that takes longer is ended and fails."""
    log_level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """Level of the children's logs."""


class Recipe(Section):
    """One recipe: what is wanted, from base model and data to the evaluated 4-bit models."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    """Names the runs and the MLflow experiment: small letters, digits, dashes."""
    model: Model
    """Where the base model comes from."""
    data: Data
    """Rows of the training domain and how they are split."""
    train: Train = Train()
    """NF4 QLoRA fine-tune."""
    merge: Merge = Merge()
    """Which merged model is quantized."""
    calibrate: Calibrate = Calibrate()
    """Calibration set, sampled from train."""
    quantize: Quantize = Quantize()
    """Schemes."""
    evaluate: Evaluate = Evaluate()
    """Arms, metrics and scorer."""
    measure: Measure = Measure()
    """Speed."""
    gate: Gate = Gate()
    """What a candidate for promotion may lose."""
    promote: Promote = Promote()
    """What is promoted."""
    serve: Serve = Serve()
    """Where it is to be served."""
    run: RunSettings = RunSettings()
    """Where it runs."""

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return self.promote.model_name or self.name

    @property
    def micro_batch(self) -> int:
        """Rows per forward pass in training."""
        return self.run.micro_batch or max(1, self.train.batch_size // self.run.processes)

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> Recipe:
        together = self.micro_batch * self.run.processes
        if self.train.batch_size % together:
            times = f" times run.processes {self.run.processes}" if self.run.processes > 1 else ""
            raise ValueError(
                f"run.micro_batch {self.micro_batch}{times} does not divide train.batch_size {self.train.batch_size}: "
                "accumulation needs a whole number of micro-batches a step"
            )
        return self


def is_hub_id(name: str, *, folder: Path) -> bool:
    """True where `name` looks like `org/name` and no such path exists below `folder`."""
    plain = not name.startswith((".", "/", "~")) and name.count("/") == 1
    return plain and not (folder / name).exists()


def recipe_of_run(resolved: Mapping[str, Any]) -> Recipe:
    """The recipe in a run's recipe.resolved.json; older runs also name `run.workers`, which never had an effect.

    Raises:
        ValidationError: It is one of another version of Quench.
    """
    run = {key: value for key, value in resolved.get("run", {}).items() if key != "workers"}
    return Recipe.model_validate({**resolved, "run": run})
