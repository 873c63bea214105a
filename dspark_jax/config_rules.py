"""What must hold of a config besides the range of each field (`ranges.py`): between fields, and of files."""

import dataclasses
import re
from collections.abc import Iterator

from dspark_jax import layer_sizes, rope_scaling
from dspark_jax.architecture import TargetArchitecture
from dspark_jax.config import Config, DataConfig, DecodeMeshConfig, DrafterConfig, LossConfig
from dspark_jax.errors import InputError
from dspark_jax.kinds import EAGLE3_SETTINGS, KINDS
from dspark_jax.paths import check_path
from dspark_jax.ranges import NOT_NEGATIVE, range_problems
from dspark_jax.registry import HEADS, LOSS_TERMS, listed, unknown
from dspark_jax.target.families import FAMILIES, known, of_drafters
from dspark_jax.target.families.family import FULL, SLIDING
from dspark_jax.vocabulary import decode_vocabulary

INIT_LAYERS = ("random", "target")
BLOCK_LAYOUTS = ("anchor_first", "fill_in")
EAGLE3_NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def _feature_problems(config: Config) -> Iterator[str]:
    """What does not go with features from disk."""
    target, data = config.target.architecture, config.data
    if data.features not in ("online", "cache", "torch"):
        yield f"data.features={data.features!r} is unknown; use online, cache or torch"
    if data.thinking not in ("off", "on", "given", "mixed"):
        yield f"data.thinking={data.thinking!r} is unknown; use off, on, given or mixed"
    if data.thinking == "mixed" and not data.regenerate:
        yield (
            "data.thinking='mixed' needs data.regenerate=True: answers of files have thoughts or have none; set "
            "data.thinking='given'"
        )
    if data.supervised not in ("both", "thinking", "answer"):
        yield f"data.supervised={data.supervised!r} is unknown; use both, thinking or answer"
    if data.thinking in ("off", "mixed") and data.supervised == "thinking":
        of = "" if data.thinking == "off" else " of the prompts that are asked without"
        yield (
            f"data.supervised='thinking' with data.thinking={data.thinking!r} leaves nothing to train{of}; set "
            "data.thinking='on'"
        )
    if data.feature_dtype not in ("int8", "bfloat16"):
        yield f"data.feature_dtype={data.feature_dtype!r} is unknown; use int8 or bfloat16"
    if target.unsupported and data.regenerate and not data.answers.endpoints:
        yield (
            f"data.regenerate=True: a {target.unsupported} has no definition in JAX and does not answer here; set "
            "data.regenerate=False to train on the answers of the files, or name servers that have the target in "
            "data.answers.endpoints"
        )
    if target.unsupported and config.mesh.decode != DecodeMeshConfig():
        yield (
            f"mesh.decode={_stated(config.mesh.decode)}: a {target.unsupported} is run by PyTorch, and decodes on one "
            "device; leave mesh.decode as it is"
        )


def _stated(given: DecodeMeshConfig) -> str:
    """The sizes of a mesh."""
    return " ".join(f"{name}={size}" for name, size in vars(given).items())


def _refresh_problems(config: Config) -> Iterator[str]:
    """What does not go with answers that are decoded while a drafter is trained."""
    train, data = config.train, config.data
    if not train.refresh_every:
        return
    if train.refresh_parts == 1:
        yield "train.refresh_parts=1 leaves nothing to answer in training; use 2 or more, or train.refresh_every=0"
    given = {"data.regenerate": data.regenerate, "data.features": data.features}
    given |= {"data.answers.endpoints": data.answers.endpoints}
    needed = {"data.regenerate": True, "data.features": "online", "data.answers.endpoints": ()}
    for field, value in needed.items():
        if given[field] != value:
            yield (
                f"train.refresh_every={train.refresh_every} needs {field}={value!r}, it is {given[field]!r}: the "
                "target answers in the run itself; change one of them"
            )


def _answer_problems(data: DataConfig) -> Iterator[str]:
    """What does not hold of who answers."""
    answers = data.answers
    for url in answers.endpoints:
        if not re.match(r"https?://[^/\s]", url):
            yield f"data.answers.endpoints has {url!r}; URLs such as http://localhost:8000/v1 are needed"
    if len(set(answers.endpoints)) < len(answers.endpoints):
        yield f"data.answers.endpoints={answers.endpoints} names a server twice; name each once"
    if answers.mode not in ("tokens", "chat"):
        yield f"data.answers.mode={answers.mode!r} is unknown; use tokens or chat"
    if answers.endpoints and not data.regenerate:
        yield "data.answers.endpoints needs data.regenerate=True; given answers are trained as they are"


PATHS = ("target.path", "data.prompts", "train.init_from", "eval.prompts")
"""Fields that are paths, here or in a bucket; a target may be an id on the hub instead."""


def _path_problems(config: Config) -> Iterator[str]:
    """Paths that are none here."""
    for field in PATHS:
        group, name = field.split(".")
        given = getattr(getattr(config, group), name)
        try:
            for path in [given] if isinstance(given, str) else given:
                check_path(field, path)
        except InputError as error:
            yield str(error)


def problems(config: Config) -> Iterator[str]:
    """Yields one line per fact about a config that does not hold: field, value, remedy."""
    target, drafter, data, train = config.target.architecture, config.drafter, config.data, config.train
    yield from _path_problems(config)
    if not target.vocab_size:
        yield (
            f"target.path={config.target.path!r} has no config.json and target.architecture is not stated; "
            "give the directory of a Hugging Face model"
        )
        return
    if target.model_type not in FAMILIES:
        yield f"target.architecture.model_type={target.model_type!r} is unknown; use one of: {known()}"
        return
    yield from _drafter_problems(drafter, target)
    if train.init_from and drafter.init_layers != "random":
        yield (
            f"train.init_from={train.init_from!r} and drafter.init_layers={drafter.init_layers!r} both say how the "
            "layers begin; leave one out"
        )
    yield from _eagle3_problems(config)
    yield from _loss_problems(config.loss, drafter)
    yield from _feature_problems(config)
    yield from _answer_problems(config.data)
    if target.num_attention_heads % max(target.num_key_value_heads, 1):
        yield (
            f"target num_attention_heads={target.num_attention_heads} is no multiple of num_key_value_heads="
            f"{target.num_key_value_heads}; check the model's config.json"
        )
    yield from range_problems(config)
    if train.accumulate > 0 and train.batch_size % train.accumulate:
        yield f"train.batch_size={train.batch_size} is not divisible by train.accumulate={train.accumulate}"
    if train.recompute not in ("nothing", "cheap", "layers"):
        yield f"train.recompute={train.recompute!r} is unknown; use nothing, cheap or layers"
    if train.checkpoint_every > 0 and train.evaluate_every % train.checkpoint_every:
        yield (
            f"train.evaluate_every={train.evaluate_every} is no multiple of train.checkpoint_every="
            f"{train.checkpoint_every}; what is measured is kept as a checkpoint, so change one of them"
        )
    yield from _refresh_problems(config)
    if data.max_prompt_length >= data.max_length:
        yield (
            f"data.max_prompt_length={data.max_prompt_length} leaves no room for an answer in "
            f"data.max_length={data.max_length}; lower the first or raise the second"
        )
    if target.max_position_embeddings and data.max_length > target.max_position_embeddings:
        yield (
            f"data.max_length={data.max_length} exceeds the target's max_position_embeddings="
            f"{target.max_position_embeddings}; lower it"
        )
    if config.optim.kind not in ("adamw", "muon"):
        yield f"optim.kind={config.optim.kind!r} is unknown; use adamw or muon"
    for name, value in {"target.dtype": config.target.dtype, "drafter.dtype": drafter.dtype}.items():
        if value not in ("auto", "float32", "bfloat16"):
            yield f"{name}={value!r} is unknown; use auto, float32 or bfloat16"
    mesh, decode = config.mesh, config.mesh.decode
    axes = (mesh.data, mesh.fsdp, mesh.tensor)
    if any(size != -1 and size < 1 for size in axes) or axes.count(-1) > 1:
        yield f"mesh={axes} (data, fsdp, tensor) must be positive sizes, at most one of them -1"
    axes = (decode.data, decode.fsdp)
    if any(size != -1 and size < 1 for size in axes) or axes.count(-1) > 1 or decode.tensor < 0:
        yield (
            f"mesh.decode={(*axes, decode.tensor)} (data, fsdp, tensor) must be positive sizes, at most one of the "
            "first two -1; tensor may be 0, which chooses it by memory"
        )


def _drafter_problems(drafter: DrafterConfig, target: TargetArchitecture) -> Iterator[str]:
    """What does not hold of a drafter for a target of this shape."""
    if drafter.kind not in KINDS:
        yield unknown("drafter.kind", drafter.kind, KINDS)
        return
    name, kind = drafter.kind, KINDS[drafter.kind]
    last, ids = target.num_hidden_layers - 1, drafter.target_layer_ids
    if not ids or list(ids) != sorted(set(ids)):
        yield f"drafter.target_layer_ids={ids} must be ascending and without repeats, e.g. (1, 9, 17)"
    if kind.reads_last_layer and len(ids) != 1:
        yield f"drafter.target_layer_ids={ids}: {name} reads one layer; use ({last},), the last one"
    for i in ids:
        if i == last and not (kind.reads_last_layer or kind.own_layers):
            yield (
                f"drafter.target_layer_ids={ids} contains {i}, the last layer, whose output servers do not expose "
                f"before the final norm; use ids from -1 to {last - 1}"
            )
        elif not -1 <= i <= last:
            yield f"drafter.target_layer_ids={ids} contains {i}, outside -1..{last - 1} of this {last + 1}-layer target"
    if not 0 <= drafter.mask_token_id < target.vocab_size:
        yield (
            f"drafter.mask_token_id={drafter.mask_token_id} is outside the vocabulary 0..{target.vocab_size - 1}; "
            "use an id that no text produces, e.g. an unused row"
        )
    if not kind.has_heads and (drafter.markov_rank or drafter.confidence_head):
        yield f"drafter.kind={name!r} has no heads; set drafter.markov_rank=0 and drafter.confidence_head=False"
    if kind.has_heads and drafter.markov_rank <= 0:
        yield f"drafter.markov_rank={drafter.markov_rank} must be positive for {name}; use 256, or kind='dflash'"
    if drafter.markov_head_type not in HEADS:
        yield unknown("drafter.markov_head_type", drafter.markov_head_type, HEADS)
    yield from _convolution_problems(drafter, target)
    yield from _window_problems(drafter)
    yield from _own_layers_problems(drafter, target)
    yield from rope_scaling.problems(drafter.rope_type, drafter.rope_scaling)
    if not (kind.own_layers or of_drafters(target).long_drafters) and (
        drafter.sliding_window or drafter.rope_type != "default"
    ):
        yield (
            f"drafter.sliding_window={drafter.sliding_window}, drafter.rope_type={drafter.rope_type!r}: drafters with "
            f"the layers of {of_drafters(target).title} have neither windows nor scaled RoPE; leave both out"
        )
    if drafter.markov_head_type == "selector" and drafter.selector_top_k > target.vocab_size:
        yield f"drafter.selector_top_k={drafter.selector_top_k} exceeds the vocabulary of {target.vocab_size}; lower it"
    if drafter.init_layers not in INIT_LAYERS:
        yield f"drafter.init_layers={drafter.init_layers!r} is unknown; use {listed(INIT_LAYERS)}"
    if drafter.init_layers != "random" and kind.token_by_token:
        yield f"drafter.init_layers={drafter.init_layers!r}: the layer of {name} reads more; set it to 'random'"
    if drafter.block_layout not in BLOCK_LAYOUTS:
        yield f"drafter.block_layout={drafter.block_layout!r} is unknown; use {listed(BLOCK_LAYOUTS)}"
    for field, (value, why) in kind.fixed.items():
        if getattr(drafter, field) != value:
            yield f"drafter.{field}={getattr(drafter, field)}: {name} {why}; set it to {value}"


def _eagle3_problems(config: Config) -> Iterator[str]:
    """What does not hold of the settings that EAGLE-3 alone has."""
    target, drafter = config.target.architecture, config.drafter
    kind, size = KINDS.get(drafter.kind), drafter.draft_vocab_size
    if kind is None:
        return
    if not kind.eagle3:
        for field, value in EAGLE3_SETTINGS.items():
            if getattr(drafter, field) != value:
                given = getattr(drafter, field)
                yield f"drafter.{field}={given!r}: {drafter.kind} has no such setting; set it to {value!r}"
        return
    for name in drafter.eagle3_norms:
        if name not in EAGLE3_NORMS:
            yield unknown("drafter.eagle3_norms", name, EAGLE3_NORMS)
    if {"norm_before_fc", "fc_norm"} <= {*drafter.eagle3_norms}:
        yield "drafter.eagle3_norms has norm_before_fc and fc_norm, which exclude each other; leave one out"
    layers = of_drafters(target)
    if layers.name != "qwen3" and (size or drafter.eagle3_norms or not drafter.qk_norms):
        yield (
            "drafter.qk_norms, eagle3_norms and draft_vocab_size are for layers like Qwen3's, drafters of "
            f"{layers.title} have their own; set qk_norms=True, eagle3_norms=() and draft_vocab_size=0"
        )
    if size > target.vocab_size:
        yield f"drafter.draft_vocab_size={size} exceeds the target's vocabulary of {target.vocab_size}; lower it"
    if not size and (drafter.draft_vocabulary or not drafter.train_head):
        yield "drafter.train_head and draft_vocabulary are about a head that draft_vocab_size=0 leaves out; set it"
    if not drafter.train_head and config.optim.weight_decay:
        yield (
            f"drafter.train_head=False with optim.weight_decay={config.optim.weight_decay}, which changes the head; "
            "set one of them to its default"
        )
    if size and config.loss.ce:
        yield (
            f"loss.ce={config.loss.ce}: the data has tokens outside a drafter's own vocabulary; set loss.ce=0, the "
            "term soft_ce does without them"
        )
    if drafter.draft_vocabulary:
        try:
            decode_vocabulary(drafter.draft_vocabulary, size, target.vocab_size)
        except ValueError as error:
            yield f"drafter.draft_vocabulary: {error}; leave it empty, `train` fills it"


def _window_problems(drafter: DrafterConfig) -> Iterator[str]:
    """What does not hold of the windows."""
    kinds, window, rows = drafter.layer_types, drafter.sliding_window, drafter.block_rows
    if kinds and (len(kinds) != drafter.num_layers or set(kinds) - {FULL, SLIDING}):
        yield (
            f"drafter.layer_types={kinds} must name {SLIDING} or {FULL} for each of the {drafter.num_layers} layers; "
            "correct it, or leave it out"
        )
    elif SLIDING in kinds and not window:
        yield f"drafter.layer_types={kinds} has layers with a window and drafter.sliding_window is 0; set its rows"
    elif kinds and window and SLIDING not in kinds:
        yield (
            f"drafter.sliding_window={window} and drafter.layer_types={kinds} has no layer with a window; "
            f"name {SLIDING} there, or set the window to 0"
        )
    if 0 < window < rows:
        yield f"drafter.sliding_window={window} is less than the {rows} rows of a block, which see each other; raise it"


def _own_layers_problems(drafter: DrafterConfig, target: TargetArchitecture) -> Iterator[str]:
    """What does not hold of layers with sizes of their own."""
    if KINDS[drafter.kind].own_layers:
        if not drafter.sliding_window:
            yield f"drafter.sliding_window=0: every layer of {drafter.kind} has a window; set its rows, e.g. 128"
        yield from layer_sizes.problems(target, drafter.layer_sizes)
    elif drafter.layer_sizes:
        yield (
            f"drafter.layer_sizes={drafter.layer_sizes}: the layers of {drafter.kind} have the sizes of the target's; "
            "leave it out, or use kind='dspark5'"
        )


def _convolution_problems(drafter: DrafterConfig, target: TargetArchitecture) -> Iterator[str]:
    """What does not hold of the convolutions."""
    taps, group = drafter.conv_kernel_size, drafter.conv_group_size
    if taps > drafter.block_rows:
        yield f"drafter.conv_kernel_size={taps} exceeds the {drafter.block_rows} rows of a block; lower it"
    if taps and group > 0 and target.hidden_size % group:
        yield f"drafter.conv_group_size={group} does not divide the target's width {target.hidden_size}; use a divisor"


def _loss_problems(loss: LossConfig, drafter: DrafterConfig) -> Iterator[str]:
    """What does not hold of the loss's terms and their weights."""
    own = [field.name for field in dataclasses.fields(loss) if field.name in LOSS_TERMS]
    for name, weight in loss.extra.items():
        if name in own:
            yield f"loss.extra has {name!r}, which has a field of its own; set loss.{name}={weight}"
        elif name not in LOSS_TERMS:
            yield f"loss.extra has {name!r}, which is unknown; use {listed(LOSS_TERMS)}"
        elif weight not in NOT_NEGATIVE:
            yield f"loss.extra has {name!r}: {weight}; each weight must be {NOT_NEGATIVE.words}, and finite"
    if loss.extra.get("selector") and drafter.markov_head_type != "selector":
        yield (
            f"loss.extra has 'selector', the loss of a head that drafter.markov_head_type="
            f"{drafter.markov_head_type!r} leaves out; leave the term out too"
        )
    heads = () if drafter.confidence_head else ("confidence",)
    if not any(weight for name, weight in loss.coefficients().items() if name not in heads):
        yield "loss has no term with a weight above 0, so that nothing would be trained; set one, e.g. loss.ce=1.0"
