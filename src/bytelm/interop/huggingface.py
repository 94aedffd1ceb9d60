"""The format of Hugging Face ``transformers``: ``BltForCausalLM``.

Its implementation has the doubled residual, entropy patching and a transformer as entropy model,
and no options for anything else, so only models trained with these can be exported; rule and scorer
may be others if patch lengths are given to each forward pass. Configurations
from which it computes something else than the official code (see ``docs/fidelity.md``) are refused,
except for a maximum patch length, which is applied as in the official code.
"""

from pathlib import Path
from typing import Any

from bytelm import codec
from bytelm.config import (
    BlockConfig,
    BLTConfig,
    EntropyPatching,
    FittedNgramConfig,
    ModelDescription,
    ScorerConfig,
    StackConfig,
    TransformerConfig,
    kind_of,
)
from bytelm.errors import CheckpointError, ConfigError
from bytelm.interop.names import Naming
from bytelm.interop.options import Options, build
from bytelm.storage import read_json
from bytelm.version import __version__

CONFIG = "config.json"
OWN = "bytelm"
"""Section of an exported configuration for options that ``transformers`` does not have."""
DEFAULT_BYTES = 24_576
THETA, SCORER_THETA = 500_000.0, 10_000.0
SCALING = {
    "linear": {"factor": ("factor", float)},
    "llama3": {
        "factor": ("factor", float),
        "low_freq_factor": ("low_freq_factor", float),
        "high_freq_factor": ("high_freq_factor", float),
        "original_max_position_embeddings": ("original_context", int),
    },
}
"""Kinds of scaling of rotary frequencies; their options, with the names and types of bytelm's."""

NAMING = Naming(
    block={
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.down": ("mlp.down_proj",),
        "attention_norm": ("input_layernorm",),
        "feed_forward_norm": ("post_attention_layernorm",),
    },
    cross_attention={
        "query": ("q_proj",),
        "key_value": ("k_proj", "v_proj"),
        "out": ("o_proj",),
        "query_norm": ("q_norm",),
        "key_value_norm": ("k_norm",),
    },
    single={
        "encoder.embedding.ids": "model.local_encoder.embed_tokens",
        "encoder.pool_projection": "model.local_encoder.patch_embedding_projection",
        "encoder.patch_projection": "model.global_transformer.token_embedding_projection",
        "decoder.latent_projection": "model.local_decoder.patch_embedding_projection",
        "decoder.norm": "model.local_decoder.norm",
        "decoder.output": "lm_head",
    },
    scorer={
        "embedding.ids": "model.patcher.embed_tokens",
        "norm": "model.patcher.norm",
        "output": "model.patcher.lm_head",
    },
    parts={
        "encoder.blocks": "model.local_encoder.layers",
        "encoder.cross_attention": "model.local_encoder.cross_attn_layers",
        "global_model.blocks": "model.global_transformer.layers",
        "decoder.blocks": "model.local_decoder.layers",
        "decoder.cross_attention": "model.local_decoder.cross_attn_layers",
        "scorer.blocks": "model.patcher.layers",
    },
    hash_embeddings=lambda count: ("model.encoder_hash_tok_embedding.weight",),
)

# Options that every configuration of transformers may have, and options of generation and training.
_NO_PART = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "model_type", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "initializer_range",
    "_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "attn_impl",
    "attn_bias_type", "id2label", "label2id", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "max_position_embeddings", "patching_batch_size", "patching_device",
    "realtime_patching", "rope_scaling", "rope_parameters", "rope_theta", "output_attentions",
    "output_hidden_states", "problem_type", "auto_map", "seed", "init_std_factor", "init_base_std",
)  # fmt: skip


class _Part:
    """Options that every sub-configuration has."""

    def __init__(
        self, options: Options, dim: int, layers: int, heads: int, ffn: int | None, theta: float
    ) -> None:
        self.dim = options.take("hidden_size", int, dim)
        self.layers = options.take("num_hidden_layers", int, layers)
        self.heads = options.take("num_attention_heads", int, heads)
        computed = int(8 * self.dim / 3)
        self.ffn = options.take_nullable("intermediate_size", int, ffn) or computed
        self.kv_heads = options.take_nullable("num_key_value_heads", int, None) or self.heads
        options.expect("head_dim", self.dim // max(self.heads, 1))
        # transformers does not read norm_eps.
        self.eps = options.take("rms_norm_eps", float, 1e-5)
        options.ignore(["norm_eps"])
        options.expect("hidden_act", "silu")
        options.expect("dropout", 0, 0.0)
        options.expect("tie_word_embeddings", False)
        options.expect("vocab_size", codec.VOCAB_SIZE)
        options.expect("pm_size", 0)
        self.theta, self.scaling = _rope(options, theta)

    def stack(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads if self.kv_heads != self.heads else None,
            "ffn_dim": self.ffn,
            "norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_scaling": self.scaling,
        }


def _rope(options: Options, default: float) -> tuple[float, dict[str, Any] | None]:
    """Return the base of the rotary frequencies, and how they are scaled."""
    theta, scaling = options.take("rope_theta", float, default), None
    for name in ("rope_scaling", "rope_parameters"):
        rope = options.section(name)
        kind = rope.take("rope_type", str, rope.take("type", str, "default"))
        theta = rope.take("rope_theta", float, theta)
        if kind in SCALING:
            scaling = {"kind": kind} | {
                ours: rope.take(theirs, value) for theirs, (ours, value) in SCALING[kind].items()
            }
        elif kind != "default":
            raise CheckpointError(
                f"{rope.where}: rope_type {kind!r} is not supported: default, "
                f"{' and '.join(SCALING)} are"
            )
        rope.finish()
    return theta, scaling


def read_description(folder: Path) -> ModelDescription:
    """Return the description of the model in a folder.

    Raises:
        CheckpointError: the configuration is missing, or has an option that bytelm, or the
            implementation of ``transformers``, does not support.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is not in the format of transformers: it has no {CONFIG}")
    data = read_json(path)
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind != "blt":
        hint = ""
        if isinstance(data, dict) and "args" in data:
            hint = " (it is in the official format: bytelm import official)"
        raise CheckpointError(f"{path} does not describe a BLT of transformers{hint}")
    options = Options(data, str(path))
    own = options.section(OWN)
    patching = _patching(options, OWN in data, own.take("patch_size", float, None))
    context = own.take("context_bytes", int, None)
    own.ignore(["version"])
    own.finish()
    encoder, decoder = options.section("encoder_config"), options.section("decoder_config")
    if context is None:
        context = encoder.take("max_position_embeddings", int, DEFAULT_BYTES)
    scorer = _scorer(options.section("patcher_config"))
    config = _blt(options, encoder, decoder, str(path))
    options.expect("vocab_size", codec.VOCAB_SIZE)
    options.expect("tie_word_embeddings", False)
    options.expect("pm_size", 0)
    options.ignore(_NO_PART)
    options.finish()
    description = {
        "model": config,
        "patching": patching,
        "scorer": ScorerConfig(model=scorer),
        "context_bytes": context,
    }
    return build(ModelDescription, description, str(path))


def _patching(options: Options, is_ours: bool, patch_size: float | None) -> EntropyPatching:
    options.expect("patching_mode", "entropy", remedy="transformers makes one-byte patches of it")
    options.expect("patch_in_forward", True, remedy="there is no entropy model in the folder")
    options.expect("monotonicity", False)
    options.expect("patching_threshold_add", 0, 0.0)
    size = options.take("patch_size", float, 4.0)
    if is_ours:
        size = patch_size
    threshold = options.take_nullable("patching_threshold", float, 1.335442066192627)
    if threshold is None:
        raise CheckpointError(
            "patching_threshold is null: set it to the one that the model was trained with"
        )
    rule = {
        "threshold": threshold,
        "patch_size": size if size and size > 1 else None,
        "max_length": options.take("max_patch_length", int, None),
    }
    return build(EntropyPatching, rule, CONFIG)


def _scorer(options: Options) -> TransformerConfig:
    part = _Part(options, 768, 14, 12, 2048, SCORER_THETA)
    window = options.take_nullable("sliding_window", int, 512)
    options.ignore(_NO_PART)
    options.finish()
    return build(TransformerConfig, {**part.stack(), "window": window}, "patcher_config")


def _blt(options: Options, encoder: Options, decoder: Options, where: str) -> BLTConfig:
    slots = options.take("cross_attn_k", int, 2)
    window = options.take_nullable("local_attention_window_len", int, 512)
    global_options = options.section("global_config")
    first = _Part(encoder, 1024, 1, 16, None, THETA)
    last = _Part(decoder, 1024, 9, 16, 2816, THETA)
    middle = _Part(global_options, 2048, 25, 16, 5632, THETA)
    for part in (first, last):
        if part.kv_heads != part.heads:
            raise CheckpointError(
                f"{where}: the encoder or decoder has {part.kv_heads} key-value heads for "
                f"{part.heads} heads; transformers then shares those of cross-attention too, which "
                "bytelm does not (in the global model they are supported)"
            )
    for name in ("dim", "heads", "ffn", "eps", "theta", "scaling"):
        one, other = getattr(first, name), getattr(last, name)
        if one != other:
            raise CheckpointError(
                f"{where}: the encoder's {name} is {one} and the decoder's {other}; bytelm's share "
                "it"
            )
    width = slots * first.dim
    for section in (encoder, decoder):
        section.expect("cross_attn_k", slots)
    global_options.expect("encoder_cross_output_size", width)
    in_all_encoder = encoder.take("cross_attn_all_layers", bool, False)
    if in_all_encoder and first.layers > 1:
        raise CheckpointError(
            f"{where}: cross_attn_all_layers with {first.layers} encoder layers: transformers "
            "pools again before each of them, so all but the last have no effect; the official "
            "code and bytelm pool once. Import the weights in the official format"
        )
    # transformers reads this option of the decoder only.
    encoder.ignore(["hidden_size_global"])
    in_all_decoder = decoder.take("cross_attn_all_layers", bool, True)
    for section in (encoder, decoder, global_options):
        section.expect("hidden_size_global", middle.dim)
        section.expect("sliding_window", window)
        section.ignore(_NO_PART)
        section.finish()
    config = {
        "local": {
            **{k: v for k, v in first.stack().items() if k != "num_layers"},
            "encoder_layers": first.layers,
            "decoder_layers": last.layers,
            "window": window,
        },
        "global_model": middle.stack(),
        "cross_attention": {
            "slots": slots,
            "num_heads": first.heads,
            "encoder": "all" if in_all_encoder else "last",
            "decoder": "all" if in_all_decoder else "first",
            "residual": "doubled",
        },
        "hash_embeddings": {
            "sizes": options.take("encoder_hash_byte_group_size", list, [3, 4, 5, 6, 7, 8]),
            "num_buckets": options.take("encoder_hash_byte_group_vocab", int, 500_002),
            "functions": options.take("encoder_hash_byte_group_nb_functions", int, 1),
        },
    }
    return build(BLTConfig, config, where)


def describe(
    description: ModelDescription, *, patch_in_forward: bool = True
) -> tuple[dict[str, Any], tuple[BLTConfig, TransformerConfig | None]]:
    """Return the equivalent configuration of ``transformers``, and those of BLT and scorer.

    Args:
        description: description of the model.
        patch_in_forward: whether ``transformers`` is to find the patches; if not, the scorer is
            left out.

    Raises:
        ConfigError: ``transformers`` has no equivalent configuration.
    """
    config = _expressible_blt(description)
    patcher = _expressible_patcher(description) if patch_in_forward else None
    local, cross = config.local, config.cross_attention
    context = description.context_bytes or DEFAULT_BYTES
    width = cross.slots * local.dim
    between = {"cross_attn_k": cross.slots, "hidden_size_global": config.global_model.dim}
    encoder = _stack(local.stack(local.encoder_layers), "blt_local_encoder", context) | {
        **between,
        "cross_attn_all_layers": cross.encoder == "all",
        "sliding_window": local.window,
    }
    decoder = _stack(local.stack(local.decoder_layers), "blt_local_decoder", context) | {
        **between,
        "cross_attn_all_layers": cross.decoder == "all",
    }
    projected = width != config.global_model.dim
    middle = _stack(config.global_model, "blt_global_transformer", context) | {
        "encoder_cross_output_size": width if projected else None
    }
    described = {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": codec.VOCAB_SIZE,
        "bos_token_id": codec.BOS,
        "eos_token_id": codec.EOS,
        "pad_token_id": codec.BOE,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        # Generation with a cache differs from that without one in transformers.
        "use_cache": False,
        "patch_in_forward": patch_in_forward,
        "local_attention_window_len": local.window,
        "cross_attn_k": cross.slots,
        "encoder_hash_byte_group_size": list(config.hash_embeddings.sizes),
        "encoder_hash_byte_group_vocab": config.hash_embeddings.num_buckets,
        "encoder_hash_byte_group_nb_functions": config.hash_embeddings.functions,
        "encoder_config": encoder,
        "decoder_config": decoder,
        "global_config": middle,
        OWN: {"version": __version__, "context_bytes": description.context_bytes},
    }
    if patcher is None:
        return described, (config, None)
    scorer, patching = patcher
    described |= {
        "patching_mode": "entropy",
        "patching_threshold": patching.threshold,
        "patch_size": max(round(patching.patch_size or 4), 1),
        "patcher_config": _stack(scorer, "blt_patcher", context)
        | {"sliding_window": scorer.window},
    }
    described[OWN]["patch_size"] = patching.patch_size
    return described, (config, scorer)


def _stack(stack: StackConfig, kind: str, context: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": stack.dim,
        "num_hidden_layers": stack.num_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": stack.head_width,
        "intermediate_size": stack.ffn_dim,
        "rms_norm_eps": stack.norm_eps,
        "max_position_embeddings": context,
        "rope_parameters": _rope_parameters(stack),
    }


def _rope_parameters(stack: StackConfig) -> dict[str, Any]:
    scaling = stack.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": stack.rope_theta}
    names = SCALING[scaling.kind].items()
    options = {theirs: getattr(scaling, ours) for theirs, (ours, _) in names}
    return {"rope_type": scaling.kind, "rope_theta": stack.rope_theta, **options}


def _unknown_options(block: BlockConfig) -> dict[str, bool]:
    """Return whether a block has each of the options that ``transformers`` does not support."""
    return {
        "head_dim (only dim / num_heads)": block.head_width * block.num_heads != block.dim,
        "rope_layout=half (only interleaved)": block.rope_layout == "half",
        "qk_norm (unsupported)": block.qk_norm,
        "biases (unsupported)": block.qkv_bias or block.out_bias or block.ffn_bias,
    }


def _expressible_blt(description: ModelDescription) -> BLTConfig:
    """Return the BLT of a description.

    Raises:
        ConfigError: ``transformers`` cannot express it.
    """
    config = description.model
    if not isinstance(config, BLTConfig):
        raise ConfigError(f"a {kind_of(type(config))} model cannot be exported: only a BLT can")
    cross, hashed = config.cross_attention, config.hash_embeddings
    refusals = {
        f"cross_attention.residual={cross.residual} (only doubled)": (cross.residual != "doubled"),
        f"cross_attention.encoder={cross.encoder} with {config.local.encoder_layers} layers (only "
        "last)": cross.encoder == "none"
        or (cross.encoder == "all" and config.local.encoder_layers > 1),
        "cross_attention.decoder=none (only first and all)": cross.decoder == "none",
        f"cross_attention.num_heads={cross.num_heads} (only local.num_heads, "
        f"{config.local.num_heads})": cross.num_heads != config.local.num_heads,
        "cross_attention.queries=learned (only pooled)": cross.queries == "learned",
        "no hash embeddings (transformers would use sizes 3 to 8)": not hashed.sizes,
        "local.num_kv_heads (cross-attention would share them)": (
            config.local.kv_heads != config.local.num_heads
        ),
        "hash_embeddings.combine=mean (only sum)": hashed.combine == "mean",
        "a vocabulary (unsupported)": config.vocabulary is not None,
    }
    for name, block in (("local", config.local), ("global_model", config.global_model)):
        refusals |= {f"{name}.{what}": wrong for what, wrong in _unknown_options(block).items()}
    _refuse(refusals, "")
    return config


def _expressible_patcher(
    description: ModelDescription,
) -> tuple[TransformerConfig, EntropyPatching]:
    """Return the scorer and the rule of a description.

    Raises:
        ConfigError: ``transformers`` cannot find patches with them.
    """
    scorer, patching = description.scorer, description.patching
    assert patching is not None
    refusals = {
        f"patching.kind={patching.kind} (only entropy)": patching.kind != "entropy",
        "patching.max_length (applied incorrectly)": patching.max_length is not None,
    }
    model = scorer.model if scorer is not None else None
    if scorer is not None:
        is_transformer = isinstance(model, TransformerConfig)
        what = "an n-gram" if isinstance(model, FittedNgramConfig) else "this kind of"
        refusals |= {
            f"{what} scorer as entropy model (only a transformer)": not is_transformer,
            "scorer.reset_at_newline (unsupported)": scorer.reset_at_newline,
        }
    if isinstance(model, TransformerConfig):
        hashed = model.hash_embeddings is not None
        refusals["scorer.model.hash_embeddings (unsupported)"] = hashed
        for name, wrong in _unknown_options(model).items():
            refusals[f"scorer.model.{name}"] = wrong
    _refuse(
        refusals,
        ", or export it with --no-patch-in-forward (in Python, patch_in_forward=False) and give "
        "transformers the patch lengths",
    )
    assert isinstance(model, TransformerConfig)
    assert isinstance(patching, EntropyPatching)
    return model, patching


def _refuse(refusals: dict[str, bool], remedy: str) -> None:
    wrong = [what for what, is_wrong in refusals.items() if is_wrong]
    if wrong:
        raise ConfigError(
            f"transformers cannot run this model, because of {'; '.join(wrong)}: to export a "
            f"model, train it with options that transformers supports{remedy}"
        )
