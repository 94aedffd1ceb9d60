"""The format of facebookresearch/blt: ``config.json`` or ``params.json``, and weights.

As published on the Hub a folder holds ``config.json`` with ``{"args": {...}}`` and
``model.safetensors``; as written by its training code ``params.json`` and ``consolidated.pth``.
"""

from pathlib import Path
from typing import Any

from bytelm import codec
from bytelm.config import (
    BLTConfig,
    EntropyPatching,
    ModelDescription,
    PatchingConfig,
    ScorerConfig,
    SpacePatching,
    TransformerConfig,
)
from bytelm.errors import CheckpointError
from bytelm.interop.names import Naming
from bytelm.interop.options import Options, build
from bytelm.storage import read_json

CONFIG, PARAMS = "config.json", "params.json"
LOADER_WINDOW = 512
"""Window of every entropy model that the official loader reads from ``params.json``."""
ENTROPY_THETA = 10_000.0
"""Default rope theta of entropy models in the official code."""

NAMING = Naming(
    block={
        "attention.qkv": ("attention.wq", "attention.wk", "attention.wv"),
        "attention.out": ("attention.wo",),
        "feed_forward.gate_up": ("feed_forward.w1", "feed_forward.w3"),
        "feed_forward.down": ("feed_forward.w2",),
        "attention_norm": ("attention_norm",),
        "feed_forward_norm": ("ffn_norm",),
    },
    cross_attention={
        "query": ("wq",),
        "key_value": ("wk", "wv"),
        "out": ("wo",),
        "query_norm": ("cross_attn_norm_q",),
        "key_value_norm": ("cross_attn_norm_kv",),
    },
    single={
        "encoder.embedding.ids": "local_encoder.tok_embeddings",
        "encoder.pool_projection": "local_encoder.patch_embedding_projection",
        "encoder.patch_projection": "global_transformer.token_embedding_projection",
        "decoder.latent_projection": "local_decoder.patch_embedding_projection",
        "decoder.norm": "local_decoder.norm",
        "decoder.output": "local_decoder.output",
    },
    scorer={"embedding.ids": "tok_embeddings", "norm": "norm", "output": "output"},
    parts={
        "encoder.blocks": "local_encoder.layers",
        "encoder.cross_attention": "local_encoder.cross_attn_layers",
        "global_model.blocks": "global_transformer.layers",
        "decoder.blocks": "local_decoder.layers",
        "decoder.cross_attention": "local_decoder.cross_attn_layers",
        "scorer.blocks": "layers",
    },
    hash_embeddings=lambda count: tuple(
        f"encoder_hash_tok_embedding.{i}.weight" for i in range(count)
    ),
)

# Options of training, initialisation and performance; sizes that the parts specify themselves; and
# options that the official code declares but never reads.
_NO_PART = (
    "seed", "dim", "n_layers", "n_heads", "init_base_std", "init_std_factor", "init_device",
    "init_dtype", "init_use_gaussian", "init_use_depth", "alpha_depth", "attn_impl", "eos_id",
    "attn_bias_type", "max_length", "max_seqlen", "patch_in_forward", "patching_batch_size",
    "patching_device", "pad_to_max_length", "encoder_lm_loss", "cross_attn_use_flex_attention",
    "log_patch_lengths", "recompute_fc1_out", "recompute_fc3_out", "recompute_attn", "custom_bwd",
    "layer_ckpt", "architecture", "tie_local_encoder_decoder", "tie_local_encoder_decoder_logits",
    "entropy_model_checkpoint_dir", "sequence_parallel", "loss_parallel", "fuse_sequence_parallel",
    "use_fsdp", "attn_to_keep", "full_logging_n_layers", "ngram_vocab_sizes", "conv_kernel_size",
    "encoder_ngram_table_dir", "dim_token_emb", "dim_patch_emb", "share_encoder_decoder_emb",
    "patching_thresholds_str", "encoder_preds_low_entropy_toks", "encoder_preds_random_toks",
    "rope_use_fp32_in_outer_product",
)  # fmt: skip
_PATCHER_NO_PART = (
    "patching_device", "patching_batch_size", "device", "log_time", "realtime_patching",
    "entropy_model_checkpoint_dir",
)  # fmt: skip


def read_description(blt: Path, entropy: Path | None) -> ModelDescription:
    """Return the description of the model in two official folders.

    Raises:
        CheckpointError: a configuration is missing, or has an option that bytelm does not support.
    """
    args, patcher_args = _blt_options(blt)
    scorer = None
    if entropy is not None:
        scorer_args, scorer_patcher, scorer_window = _entropy_options(entropy)
        window = scorer_args.take("sliding_window", int, scorer_window)
        scorer = ScorerConfig(model=_transformer(scorer_args, window))
        # The patching options used in training are in the folder of the entropy model.
        patcher_args = scorer_patcher or patcher_args
    patching = _patching(args, patcher_args, str(blt / CONFIG))
    if isinstance(patching, EntropyPatching) and scorer is None:
        raise CheckpointError(
            f"{blt} patches by entropy: name the folder of its entropy model as well (--entropy)"
        )
    if scorer is not None and isinstance(patching, SpacePatching):
        scorer = None
    context = args.take("max_encoder_seq_length", int, 0) or None
    config = _blt(args, str(blt))
    args.finish()
    description = {"model": config, "patching": patching, "scorer": scorer}
    return build(ModelDescription, {**description, "context_bytes": context}, str(blt))


def _sections(folder: Path) -> tuple[str, Any]:
    for name in (CONFIG, PARAMS):
        if (folder / name).is_file():
            data = read_json(folder / name)
            if not isinstance(data, dict):
                raise CheckpointError(f"{folder / name} must hold named options, not {data!r}")
            return str(folder / name), data
    raise CheckpointError(
        f"{folder} is not in the official format: it has neither {CONFIG} nor {PARAMS}"
    )


def _patcher_section(where: str, data: dict[str, Any]) -> Options | None:
    nested = data.get("data")
    section = nested.get("patcher_args") if isinstance(nested, dict) else None
    return Options(section, f"{where}: data.patcher_args") if section else None


def _blt_options(folder: Path) -> tuple[Options, Options | None]:
    where, data = _sections(folder)
    key = "args" if "args" in data else "model"
    if not isinstance(data.get(key), dict) or "dim_local_encoder" not in data[key]:
        hint = " (it is in the format of transformers: bytelm import hf)" * ("model_type" in data)
        raise CheckpointError(f"{where} does not describe an official BLT{hint}")
    return Options(data[key], f"{where}: {key}"), _patcher_section(where, data)


def _entropy_options(folder: Path) -> tuple[Options, Options | None, int | None]:
    where, data = _sections(folder)
    key = "args" if "args" in data else "entropy_model"
    if not isinstance(data.get(key), dict) or "dim_local_encoder" in data[key]:
        raise CheckpointError(f"{where} does not describe an official entropy model")
    options = Options(data[key], f"{where}: {key}")
    window = None if key == "args" else LOADER_WINDOW
    return options, _patcher_section(where, data), window


def _ffn_dim(dim: int, multiplier: float, multiple: int) -> int:
    if multiple < 1:
        raise CheckpointError(f"multiple_of is {multiple}: it must be at least 1")
    hidden = int(multiplier * int(2 * 4 * dim / 3))
    return -(-hidden // multiple) * multiple


def _transformer(args: Options, window: int | None) -> TransformerConfig:
    dim, heads = args.take("dim", int), args.take("n_heads", int)
    _check_vocabulary(args)
    _check_block(args, dim // max(heads, 1))
    config = {
        "dim": dim,
        "num_layers": args.take("n_layers", int),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(args, "n_kv_heads", heads),
        "norm_eps": args.take("norm_eps", float, 1e-5),
        "ffn_dim": _ffn_dim(
            dim, args.take("ffn_dim_multiplier", float, 1.0), args.take("multiple_of", int, 256)
        ),
        "window": window,
        "rope_theta": args.take("rope_theta", float, ENTROPY_THETA),
    }
    args.expect("weight_tying", False)
    args.ignore(_NO_PART)
    args.finish()
    return build(TransformerConfig, config, "the entropy model's configuration")


def _check_vocabulary(args: Options) -> None:
    size = args.take("vocab_size", int)
    if size != codec.VOCAB_SIZE:
        raise CheckpointError(
            f"the vocabulary has {size} ids where bytelm's has {codec.VOCAB_SIZE}: such weights "
            "cannot be used"
        )


def _kv_heads(args: Options, name: str, heads: int) -> int | None:
    """Return the number of key-value heads, or ``None`` if it equals the number of heads."""
    found = args.take_nullable(name, int, None) or heads
    return found if found != heads else None


def _check_block(args: Options, head_dim: int) -> None:
    """Check that blocks are pre-norm and without biases, as those of bytelm."""
    args.expect("head_dim", head_dim)
    args.expect("norm_affine", True)
    args.expect("pre_norm", True)
    args.expect("norm_type", "rmsnorm")
    args.expect("non_linearity", "swiglu")
    args.expect("use_rope", True)
    args.expect("dropout", 0, 0.0)


def _equal(args: Options, first: str, second: str) -> int:
    one, other = args.take(first, int), args.take(second, int)
    if one != other:
        raise CheckpointError(
            f"{first} is {one} and {second} {other}: bytelm's encoder and decoder share them"
        )
    return one


def _blt(args: Options, where: str) -> BLTConfig:
    dim = _equal(args, "dim_local_encoder", "dim_local_decoder")
    heads = _equal(args, "n_heads_local_encoder", "n_heads_local_decoder")
    global_dim, global_heads = args.take("dim_global", int), args.take("n_heads_global", int)
    multiplier = args.take("ffn_dim_multiplier", float, 1.0)
    multiple = args.take("multiple_of", int, 256)
    theta = args.take("rope_theta", float, 10_000.0)
    _check_vocabulary(args)
    _check_block(args, dim // max(heads, 1))
    eps = args.take("norm_eps", float, 1e-5)
    config = {
        "local": {
            "dim": dim,
            "num_heads": heads,
            "num_kv_heads": _kv_heads(args, "n_kv_heads", heads),
            "ffn_dim": _ffn_dim(dim, multiplier, multiple),
            "norm_eps": eps,
            "encoder_layers": args.take("n_layers_local_encoder", int),
            "decoder_layers": args.take("n_layers_local_decoder", int),
            "window": args.take("local_attention_window_len", int, None),
            "rope_theta": theta,
        },
        "global_model": {
            "dim": global_dim,
            "num_layers": args.take("n_layers_global", int),
            "num_heads": global_heads,
            "num_kv_heads": _kv_heads(args, "n_kv_heads_global", global_heads),
            "ffn_dim": _ffn_dim(global_dim, multiplier, multiple),
            "norm_eps": eps,
            "rope_theta": theta,
        },
        "cross_attention": _cross_attention(args),
        "hash_embeddings": _hash_embeddings(args),
    }
    args.expect("dim_token", dim)
    for name in ("weight_tying", "encoder_enable_byte_ngrams", "entropy_model_is_ngram_model"):
        args.expect(name, False)
    args.expect("tokenize_with_bpe_delimiter", False)
    args.expect("use_local_encoder_transformer", True)
    args.expect("pm_size", 0)
    args.expect("output_size", -1, codec.VOCAB_SIZE)
    args.expect("encoder_ngram_to_size_str", remedy="frequency n-grams are not supported")
    args.expect("global_local_decoder_residual_layer")
    args.ignore(_NO_PART)
    return build(BLTConfig, config, where)


def _cross_attention(args: Options) -> dict[str, Any]:
    args.expect("cross_attn_window_encoder")
    args.expect("cross_attn_window_decoder")
    args.expect("downsampling_by_pooling", "max")
    for name in ("cross_attn_encoder", "cross_attn_init_by_pooling"):
        if not args.take(name, bool, False):
            raise CheckpointError(
                f"{name} is off: bytelm supports only official encoders with cross-attention whose "
                "queries are initialised by pooling"
            )
    in_all_encoder = args.take("cross_attn_all_layers_encoder", bool, False)
    in_all_decoder = args.take("cross_attn_all_layers_decoder", bool, False)
    has_decoder = args.take("cross_attn_decoder", bool, False)
    return {
        "slots": args.take("cross_attn_k", int),
        "num_heads": args.take("cross_attn_nheads", int),
        "encoder": "all" if in_all_encoder else "last",
        "decoder": ("all" if in_all_decoder else "first") if has_decoder else "none",
        "residual": "doubled",
    }


def _hash_embeddings(args: Options) -> dict[str, Any]:
    # The official code does not read this option.
    args.ignore(["encoder_enable_byte_group_hash"])
    num_buckets = args.take("encoder_hash_byte_group_vocab", int, 30_000)
    functions = args.take("encoder_hash_byte_group_nb_functions", int, 3)
    sizes = args.take("encoder_hash_byte_group_size", (list, str), [])
    if isinstance(sizes, str):
        sizes = [int(size) if size.isdecimal() else size for size in sizes.split(",") if size]
    return {"sizes": sizes, "num_buckets": num_buckets, "functions": functions}


def _patching(args: Options, patcher: Options | None, where: str) -> PatchingConfig:
    """Return the rule, from the options of the patcher if there are any, else of the model."""
    model_rule = {
        name: args.take(name, kind, default)
        for name, kind, default in (
            ("patching_mode", str, "entropy"),
            ("patching_threshold", float, None),
            ("patching_threshold_add", float, None),
            ("monotonicity", bool, False),
            ("max_patch_length", int, None),
            ("patch_size", float, None),
        )
    }
    mode = model_rule["patching_mode"]
    threshold, add = model_rule["patching_threshold"], model_rule["patching_threshold_add"]
    monotonic, longest = model_rule["monotonicity"], model_rule["max_patch_length"]
    size = model_rule["patch_size"]
    if patcher is not None:
        mode = patcher.take("patching_mode", str, mode)
        threshold = patcher.take("threshold", float, threshold)
        add = patcher.take("threshold_add", float, None)
        monotonic = patcher.take("monotonicity", bool, False)
        longest = patcher.take("max_patch_length", int, None)
        size = patcher.take("patch_size", float, size)
        patcher.ignore(_PATCHER_NO_PART)
        patcher.finish()
    if add is not None or monotonic:
        raise CheckpointError(
            "the official combined and monotonic rules (threshold_add, monotonicity) are not "
            "supported: they also start a patch at every document's second byte, whatever its "
            "entropy, which bytelm's do not"
        )
    if mode == "space":
        return build(SpacePatching, {"max_length": longest}, where)
    if mode != "entropy":
        raise CheckpointError(
            f"patching_mode {mode!r} is not supported: entropy and space are (a model patched "
            "otherwise can be trained here, with `patching` in its recipe)"
        )
    if threshold is None:
        raise CheckpointError(f"{where}: there is no patching threshold: add patching_threshold")
    wanted = size if size is not None and size > 1 else None
    options = {"threshold": threshold, "patch_size": wanted, "max_length": longest}
    return build(EntropyPatching, options, where)
