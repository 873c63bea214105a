"""Typed configuration of every command: the dataclasses, their defaults and `resolve()`.

An experiment is a file `configs/x.py` with `get_config(arg='') -> Config`; `--config.train.steps=100` overrides one
field. Neither this module nor what it imports knows an accelerator library, so that a config is checked before anything
heavy is loaded. `InputError` and `TargetArchitecture` are part of it, though they are written elsewhere.
"""

import collections
import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_jax.architecture import TargetArchitecture, Unsupported
from dspark_jax.errors import InputError
from dspark_jax.kinds import KINDS, VARIANTS
from dspark_jax.registry import HEADS, LOSS_TERMS


@dataclasses.dataclass
class TargetConfig:
    """The frozen model that is drafted for."""

    path: str = ""
    """A Hugging Face model directory (config.json, *.safetensors, tokenizer)."""
    dtype: str = "auto"
    """Weights and compute: float32, bfloat16, or auto (bfloat16 on accelerators, float32 on CPU)."""
    architecture: TargetArchitecture = dataclasses.field(default_factory=TargetArchitecture)
    """Stated shape; filled from `path` when left empty, and compared with it when both are there."""


@dataclasses.dataclass
class DrafterConfig:
    """The draft model."""

    kind: str = "dspark"
    """What drafts, see `dspark_jax.kinds`."""
    num_layers: int = 5
    block_size: int = 7
    """Draft tokens per round (gamma). Of eagle3 also the steps of its training-time test, of mtp 1."""
    target_layer_ids: tuple[int, ...] = (1, 9, 17, 25, 33)
    """Tapped target layers: i = raw output of layer i, -1 = the embeddings. Never the last layer, but for mtp, which
    reads one layer; empty is the last one there."""
    mask_token_id: int = 151669
    markov_rank: int = 256
    confidence_head: bool = True
    confidence_with_markov: bool = True
    dtype: str = "auto"
    """Compute type; parameters are always float32."""
    initializer_range: float = 0.02
    init_layers: str = "random"
    """How the draft layers of a fresh run begin: random, or target: as the target's last layers (beyond the paper)."""
    markov_head_type: str = "vanilla"
    """Sequential head of dspark: what it sees of the block so far."""
    block_layout: str = "anchor_first"
    """Rows of a block: anchor_first (the anchor's row is the first prediction: gamma rows) or fill_in (what the
    anchor's row gives is thrown away, every mask predicts the token at its own position: gamma + 1 rows)."""

    conv_kernel_size: int = 0
    """Taps of the convolutions along a block's rows around attention and MLP (DFlash 2 has 2); 0: there are none."""
    conv_group_size: int = 16
    """Channels that share the coefficients of a convolution which depend on the row."""
    selector_top_k: int = 16
    """Likeliest tokens of a position among which the head `selector` chooses; `drafter.markov_rank` is its rank."""
    qk_norms: bool = True
    """Whether the layer of eagle3 norms queries and keys, as Qwen3's does; off: a layer of Llama, which more servers
    know."""
    eagle3_norms: tuple[str, ...] = ()
    """Which norms eagle3 has besides, by the names in files: norm_before_residual (the residual is the normed feature),
    norm_before_fc or fc_norm (of all tapped features together, or of each, before they are fused), norm_output (what is
    fed back is normed)."""
    draft_vocab_size: int = 0
    """How many tokens eagle3 can draft, those that are most frequent in the training data's answers; it then has an LM
    head of its own, which begins as the target's rows. 0: all tokens, with the target's head."""
    train_head: bool = True
    """Whether that head is trained, as EAGLE's authors do; off: it stays the target's rows, as in speculators."""
    draft_vocabulary: str = ""
    """These tokens, as `train` or `convert import` writes them into the run's config; not to be given by hand."""

    sliding_window: int = 0
    """Rows that layers with a window see: those of a block see each other and the last sliding_window - 1 rows of the
    context before their anchor (in dspark5 the last sliding_window); 0: no layer has a window."""
    layer_types: tuple[str, ...] = ()
    """sliding_attention or full_attention, layer by layer; empty: with a `sliding_window` all layers have it."""
    rope_type: str = "default"
    """Scaled RoPE, for contexts beyond the trained length: default (none), linear, llama3 or yarn."""
    rope_scaling: dict[str, float] = dataclasses.field(default_factory=dict)
    """Numbers of `rope_type` by their names in a config.json, e.g.
    {"factor": 4.0, "original_max_position_embeddings": 4096}."""

    layer_sizes: dict[str, float] = dataclasses.field(default_factory=dict)
    """Sizes of the layers of dspark5 by their names in a DeepSeek-V4's config.json, e.g. {"n_routed_experts": 64}; what
    is not given is the target's if it is one, and otherwise follows from the target's sizes."""

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """sliding_attention or full_attention, by layer."""
        usual = "sliding_attention" if self.sliding_window else "full_attention"
        return self.layer_types or (usual,) * self.num_layers

    @property
    def block_rows(self) -> int:
        """Rows of a block, its anchor included; what files and servers call the block size."""
        return self.block_size + (self.block_layout == "fill_in")


@dataclasses.dataclass
class AnswersConfig:
    """Who answers the prompts, and how; temperature and seed are `data.temperature` and `data.seed`."""

    endpoints: tuple[str, ...] = ()
    """Servers that answer, by their URLs, e.g. http://localhost:8000/v1: vLLM, SGLang, llama.cpp or another one with
    OpenAI's API, serving this very target. Questions are shared out among them. Empty: the target answers here."""
    model: str = ""
    """Name of the target there; empty: the one that the server lists."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key of the servers; the key itself is stored nowhere."""
    mode: str = "tokens"
    """What is sent: tokens (our ids, to /completions), or chat (messages, to /chat/completions; the server's chat
    template must then render the same prompts as ours, which is checked)."""
    check_prompts: bool = True
    """Refuse a server that reads other prompts than ours; off: only say so."""
    concurrency: int = 64
    """Questions that servers answer at a time, over all of them."""
    retries: int = 8
    """How often a question is asked again that a server has failed to answer; then the command ends."""
    retry_wait: float = 1.0
    """Seconds before the first retry, twice as many before each later one, up to a minute."""
    timeout: float = 900.0
    """Seconds that a server may take for an answer."""
    top_p: float = 1.0
    """Of all answers, wherever they come from, as the next three: only the likeliest tokens with this probability."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability."""
    max_new_tokens: int = 0
    """Longest answer; 0: what `data.max_length` leaves it."""


@dataclasses.dataclass
class DataConfig:
    """Prompts, the answers that the target gives to them, and how they become training batches."""

    prompts: tuple[str, ...] = ()
    """Files, directories, patterns such as `sets/*.jsonl`, or data sets of the hub (`hub:OWNER/NAME?split=train`); the
    formats are in docs/data.md."""
    limit: int = 0
    """Use at most so many prompts of each file; 0 = all."""
    regenerate: bool = True
    """Let the target answer every user turn; off: train on the answers that the prompt files bring along."""
    repeats: int = 1
    """Sampled answers per prompt."""
    thinking: str = "off"
    """Whether the target thinks before it answers, in training data and evaluation: off, on, given (in conversations
    whose answers in the file have thoughts), or mixed (for a share of the prompts)."""
    thinking_share: float = 0.5
    """Share of the prompts that are asked with thinking where `thinking` is mixed; which ones follows from `seed` and
    the text of the prompt alone."""
    supervised: str = "both"
    """What is trained of an answer with thoughts: both, thinking or answer."""
    system_prompt: str = ""
    """System message put before conversations that have none; empty = none."""
    max_prompt_length: int = 2048
    """Tokens of the rendered prompt; longer prompts are set aside and counted."""
    max_length: int = 4096
    """Tokens of a whole sample; the answer is cut there."""
    min_loss_tokens: int = 14
    """Samples with fewer supervised tokens are dropped and counted."""
    pack: bool = False
    """Put several samples into one sequence of `max_length`; none sees another. `train.num_anchors` and
    `train.batch_size` then count per packed sequence."""
    features: str = "online"
    """Where the target's features come from: online (the target runs inside the train step), cache (`prepare` writes
    them to disk once), or torch (the same, computed by transformers in PyTorch: any causal LM can be the target)."""
    feature_dtype: str = "int8"
    """How features are stored: int8 with a scale per token and group of 128 values, or bfloat16."""
    temperature: float = 1.0
    answers: AnswersConfig = dataclasses.field(default_factory=AnswersConfig)
    decode_batch_size: int = 32
    """Answers that the target gives here at a time."""
    seed: int = 0
    workers: int = 1
    """Threads that read batches ahead; their number does not change the order."""


@dataclasses.dataclass
class LossConfig:
    """Loss terms (paper section 3.3; the defaults are those of the released code)."""

    decay: float = 4.0
    """Position k of a block weighs exp(-k / decay), k = 0..gamma-1."""
    ce: float = 0.1
    l1: float = 0.9
    """Weight of sum_v |p_draft - p_target|, without a half."""
    confidence: float = 1.0
    soft_ce: float = 0.0
    """Weight of the cross-entropy with the target's distribution (EAGLE-3's loss)."""
    length: float = 0.0
    """Weight of what is missing of a block's expected accepted length, 1 + sum_k a_1 .. a_k; beyond the paper."""
    per_row: bool = False
    """Divide by the number of blocks (or of EAGLE-3's rows), supervised or not, instead of by the summed weights."""
    extra: dict[str, float] = dataclasses.field(default_factory=dict)
    """Weights of further terms by name, e.g. {"mine": 0.5}: those that have no field of their own here."""

    def coefficients(self) -> dict[str, float]:
        """Weight of every term by its name."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: weight for name, weight in own.items() if name in LOSS_TERMS} | self.extra


@dataclasses.dataclass
class OptimConfig:
    """AdamW, or Muon for the matrices, with linear warm-up and cosine decay to zero."""

    kind: str = "adamw"
    """adamw (the reference's), or muon: matrices of the backbone by Muon, everything else by AdamW."""
    learning_rate: float = 6e-4
    muon_learning_rate: float = 2e-2
    """Of the matrices when kind is muon; their updates are orthogonal, so its scale is another one."""
    warmup_ratio: float = 0.04
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclasses.dataclass
class TrainConfig:
    """The training run."""

    steps: int = 1000
    batch_size: int = 512
    """Sequences per optimizer step, over all devices and accumulation steps."""
    accumulate: int = 1
    """Micro-steps per optimizer step; numerators and denominators are summed, so the result is exact."""
    num_anchors: int = 512
    """Blocks per sequence (A). eagle3 and mtp are trained on every row: `data.max_length` or more."""
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    vocab_chunk: int = 1024
    """Block positions whose logits are in memory at once, per sequence batch (see ops/vocab_loss)."""
    recompute: str = "nothing"
    """What the backward pass computes again of the drafter's layers: nothing (the fastest), cheap (all but products of
    matrices and attention) or layers (all of it: the least memory)."""
    evaluate: bool = True
    """Run `evaluate` on the last checkpoint when training has ended."""
    evaluate_every: int = 0
    """Measure accepted length on `eval.prompts` every so many steps, and at the end, and keep the best checkpoint
    beside the newest ones; 0: never. A multiple of `checkpoint_every`."""
    evaluate_limit: int = 8
    """Prompts of each set that are decoded for it, at the first of `eval.temperatures`; 0 = all."""
    evaluate_tokens: int = 256
    """Longest answer of them; `eval.max_new_tokens` if that is less."""
    refresh_every: int = 0
    """Prepare the answers to a part of the prompts only; every so many steps the drafter that is being trained helps
    the target to answer the next part, which is then trained on as well. 0: all are answered before training."""
    refresh_parts: int = 4
    """Into how many parts the prompts are divided for it, the first one included."""
    wandb_project: str = ""
    """Also log to this project of Weights & Biases (needs the package wandb); empty = do not."""
    init_from: str = ""
    """Start from the parameters of this drafter (a run's working directory, or a drafter in a Hugging Face directory)
    instead of from random ones. The optimizer starts from nothing."""


@dataclasses.dataclass
class DecodeMeshConfig:
    """How the devices decode (`engine.placement`): requests are split over data x fsdp, heads and vocabulary over
    tensor. One of data and fsdp may be -1: all devices that the others leave."""

    data: int = -1
    """Copies of the weights; no copy waits for another one."""
    fsdp: int = 1
    """Devices that hold a part of a copy each, and collect all of it anew in every round, as in training."""
    tensor: int = 0
    """Devices that share a copy by tensor parallelism; 0: the fewest whose memory holds weights and caches."""


@dataclasses.dataclass
class MeshConfig:
    """Device mesh of training. One of the axes may be -1: all devices that the others leave."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    decode: DecodeMeshConfig = dataclasses.field(default_factory=DecodeMeshConfig)


@dataclasses.dataclass
class EvalConfig:
    """Accepted length, acceptance by position and speed on held-out prompts."""

    prompts: tuple[str, ...] = ()
    limit: int = 0
    batch_size: int = 32
    max_new_tokens: int = 256
    temperatures: tuple[float, ...] = (1.0, 0.0)
    """Decoding temperatures; the first one gives the headline tau."""
    speed_prompts: int = 8
    """Prompts per set that are decoded at batch 1, with and without the drafter, to measure speed; 0: it is not."""
    speed_threads: int = 0
    """On a CPU: measure speed in a process of its own with so many XLA threads (1 is best for tiny models); 0: here.

    Several hosts measure it where they are."""
    bootstrap: int = 2000
    seed: int = 0


@dataclasses.dataclass
class CompareConfig:
    """What `compare` trains side by side. Drafters are named as in `dspark_jax.kinds`."""

    drafters: tuple[str, ...] = ("dspark", "dflash", "fill_in", "dflash2", "eagle3", "mtp", "rnn")
    """Of the main table. A further drafter is one more name here."""
    depths: tuple[int, ...] = (1, 2, 3, 4, 5)
    depth_drafters: tuple[str, ...] = ("dspark", "dflash")
    lengths: tuple[int, ...] = (4, 8, 12, 16)
    length_drafters: tuple[str, ...] = ("dspark", "rnn", "dflash")


@dataclasses.dataclass
class Config:
    """Everything one experiment states."""

    name: str = ""
    target: TargetConfig = dataclasses.field(default_factory=TargetConfig)
    drafter: DrafterConfig = dataclasses.field(default_factory=DrafterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)
    imports: tuple[str, ...] = ()
    """Modules that add loss terms, heads or kinds of drafters (docs/adding.md). They are imported wherever the config
    is used, also in processes that a command starts."""


CHOICES: Mapping[str, Mapping[str, Any]] = {
    "drafter.kind": KINDS,
    "compare.drafters": collections.ChainMap(VARIANTS, KINDS),
    "drafter.markov_head_type": HEADS,
    "loss.extra": LOSS_TERMS,
}
"""Fields that name something which may be added to: dotted path -> what there is, with a description each."""


def import_additions(config: Config) -> None:
    """Imports the modules of `config.imports`.

    Raises:
      InputError: there is no such module.
    """
    for name in config.imports:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(
                f"imports has {name!r}, which cannot be imported ({error}); install it, or add its folder to PYTHONPATH"
            ) from None


def resolve(config: Config) -> Config:
    """Fills the target's architecture from its directory, then validates; the argument is left unchanged.

    Raises:
      InputError: the first fact that does not hold, see `config_rules.problems`.
    """
    import_additions(config)
    architecture = config.target.architecture
    if (Path(config.target.path) / "config.json").exists():
        of_any_model = config.data.features == "torch"
        read = TargetArchitecture.of_any_model if of_any_model else TargetArchitecture.from_hf
        try:
            found = read(config.target.path)
        except Unsupported as error:
            raise InputError(f"{error}, or train from its features with data.features=torch") from None
        if architecture.vocab_size:
            architecture.refuse_other(found, config.target.path)
        architecture = found
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, architecture=architecture))
    kind = KINDS.get(config.drafter.kind)
    if kind and kind.reads_last_layer and not config.drafter.target_layer_ids and architecture.num_hidden_layers:
        last = (architecture.num_hidden_layers - 1,)
        config = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, target_layer_ids=last))
    from dspark_jax.config_rules import problems  # which is about the classes here

    for problem in problems(config):
        raise InputError(problem)
    return config


def to_json(config: Config) -> str:
    """The resolved config as JSON, as it is written beside every checkpoint."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


_RENAMED = {"foreign": "unsupported"}
"""What fields were called in versions up to 0.1, whose runs are read."""


def from_json(text: str) -> Config:
    """Inverse of `to_json`."""

    def build(cls: type, values: dict[str, Any]) -> Any:
        default = cls()
        kwargs = {}
        for stored, value in values.items():
            name = _RENAMED.get(stored, stored)
            field = getattr(default, name)
            if dataclasses.is_dataclass(field):
                kwargs[name] = build(type(field), value)
            else:
                kwargs[name] = tuple(value) if isinstance(value, list) else value
        return cls(**kwargs)

    return build(Config, json.loads(text))
