"""Models in other projects' formats, with random weights."""

import json

import torch
import transformers
from safetensors.torch import save_file

from builders import random_ids, threshold_between

BASE = {
    "local_dim": 32,
    "global_dim": 48,
    "heads": 2,
    "global_heads": 2,
    "global_kv_heads": 2,
    "patcher_kv_heads": 2,
    "eps": 1e-5,
    "scaling": {"rope_type": "default"},
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_all": False,
    "decoder_all": True,
    "slots": 2,
    "window": 8,
    "sizes": [3, 4, 5],
    "rows": 97,
    "functions": 1,
    "patcher_window": 6,
}
# One per option on which the formats or the implementations could differ.
VARIANTS = {
    "projection": {},
    "no projection": {"global_dim": 64},
    "one slot": {"slots": 1},
    "four slots": {"slots": 4},
    "four slots, no projection": {"slots": 4, "global_dim": 128},
    "two encoder layers": {"encoder_layers": 2},
    "all encoder layers": {"encoder_all": True},
    "first decoder layer": {"decoder_all": False, "decoder_layers": 3},
    "two hash functions": {"functions": 2, "sizes": [2, 6]},
    "one n-gram size": {"sizes": [8], "rows": 501},
    "no window": {"window": None, "patcher_window": None},
    "wide window": {"window": 40},
    "grouped heads": {"global_heads": 4, "global_kv_heads": 2, "patcher_kv_heads": 1, "eps": 1e-2},
}
# Options that the official format lacks.
SCALED = {
    "linear rope": {"scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama 3 rope": {
        "scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


def stack(c, dim, layers, heads, ffn, theta=500_000.0, **more):
    return {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim // heads,
        "intermediate_size": ffn,
        "rms_norm_eps": c["eps"],
        "rope_parameters": {"rope_theta": theta, **c["scaling"]},
        **more,
    }


def ffn_dim(dim):
    """What ``multiple_of=16`` and ``ffn_dim_multiplier=0.5`` make of a width."""
    return -(-int(0.5 * int(8 * dim / 3)) // 16) * 16


def hf_config(threshold=0.0, **changes):
    c = {**BASE, **changes}
    between = {"hidden_size_global": c["global_dim"], "cross_attn_k": c["slots"]}
    local = (c["heads"], ffn_dim(c["local_dim"]))
    return transformers.BltConfig(
        cross_attn_k=c["slots"],
        encoder_hash_byte_group_size=list(c["sizes"]),
        encoder_hash_byte_group_vocab=c["rows"],
        encoder_hash_byte_group_nb_functions=c["functions"],
        patching_threshold=threshold,
        local_attention_window_len=c["window"],
        encoder_config=stack(c, c["local_dim"], c["encoder_layers"], *local, **between)
        | {"cross_attn_all_layers": c["encoder_all"]},
        decoder_config=stack(c, c["local_dim"], c["decoder_layers"], *local, **between)
        | {"cross_attn_all_layers": c["decoder_all"]},
        global_config=stack(c, c["global_dim"], 2, c["global_heads"], ffn_dim(c["global_dim"]))
        | {"num_key_value_heads": c["global_kv_heads"]},
        patcher_config=stack(c, 32, 2, 2, 48, 10_000.0, sliding_window=c["patcher_window"])
        | {"num_key_value_heads": c["patcher_kv_heads"]},
    )


def randomize(model, seed=0):
    """Weights of about unit gain, norms away from 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            if "norm" in name:
                parameter.mul_(0.3).add_(1.0)


def hf_model(quantile=0.6, **changes):
    """A random BltForCausalLM whose threshold makes patches of several bytes."""
    model = transformers.BltForCausalLM(hf_config(**changes)).eval()
    randomize(model)
    with torch.no_grad():
        entropies, _, _ = model.model.patcher(random_ids(300)[None])
    threshold = threshold_between(entropies, quantile)
    model.config.patching_threshold = threshold
    return model


# Of the released code's names, what the port to transformers calls differently.
RENAMED = {
    ".self_attn.": ".attention.",
    ".mlp.gate_proj": ".feed_forward.w1",
    ".mlp.down_proj": ".feed_forward.w2",
    ".mlp.up_proj": ".feed_forward.w3",
    ".input_layernorm": ".attention_norm",
    ".post_attention_layernorm": ".ffn_norm",
    ".q_norm": ".cross_attn_norm_q",
    ".k_norm": ".cross_attn_norm_kv",
    ".q_proj": ".wq",
    ".k_proj": ".wk",
    ".v_proj": ".wv",
    ".o_proj": ".wo",
    "embed_tokens": "tok_embeddings",
    "patcher.lm_head": "patcher.output",
}


def official_weights(model):
    """The weights of a BltForCausalLM as the official code names them: the BLT's, the scorer's."""
    config = model.config
    blt, scorer = {}, {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        for theirs, official in RENAMED.items():
            name = name.replace(theirs, official)
        if name.startswith("patcher."):
            scorer[name.removeprefix("patcher.")] = tensor
        elif name == "encoder_hash_tok_embedding.weight":
            for i, table in enumerate(tensor.split(config.encoder_hash_byte_group_vocab)):
                blt[f"encoder_hash_tok_embedding.{i}.weight"] = table
        elif name == "lm_head.weight":
            blt["local_decoder.output.weight"] = tensor
        else:
            blt[name] = tensor
    return blt, scorer


def official_args(model):
    """The two sets of options the official code would have for a BltForCausalLM."""
    c = model.config
    encoder, decoder, middle = c.encoder_config, c.decoder_config, c.global_config
    blt = {
        "seed": 42,
        "vocab_size": 260,
        "dim": 512,
        "dim_token": None,
        "dim_global": middle.hidden_size,
        "dim_local_encoder": encoder.hidden_size,
        "dim_local_decoder": decoder.hidden_size,
        "n_layers_global": middle.num_hidden_layers,
        "n_layers_local_encoder": encoder.num_hidden_layers,
        "n_layers_local_decoder": decoder.num_hidden_layers,
        "n_heads_global": middle.num_attention_heads,
        "n_kv_heads_global": middle.num_key_value_heads,
        "n_heads_local_encoder": encoder.num_attention_heads,
        "n_heads_local_decoder": decoder.num_attention_heads,
        "patching_mode": "entropy",
        "patching_threshold": c.patching_threshold,
        "patch_size": 4.5,
        "cross_attn_encoder": True,
        "cross_attn_decoder": True,
        "cross_attn_k": c.cross_attn_k,
        "cross_attn_nheads": encoder.num_attention_heads,
        "cross_attn_all_layers_encoder": encoder.cross_attn_all_layers,
        "cross_attn_all_layers_decoder": decoder.cross_attn_all_layers,
        "cross_attn_init_by_pooling": True,
        "cross_attn_window_encoder": None,
        "downsampling_by_pooling": "max",
        "use_local_encoder_transformer": True,
        "encoder_hash_byte_group_size": c.encoder_hash_byte_group_size,
        "encoder_hash_byte_group_vocab": c.encoder_hash_byte_group_vocab,
        "encoder_hash_byte_group_nb_functions": c.encoder_hash_byte_group_nb_functions,
        "local_attention_window_len": c.local_attention_window_len,
        "max_encoder_seq_length": 24576,
        "rope_theta": 500000.0,
        "norm_eps": encoder.rms_norm_eps,
        "multiple_of": 16,
        "ffn_dim_multiplier": 0.5,
        "attn_bias_type": "local_block_causal",
        "non_linearity": "swiglu",
        "dropout": 0,
        "full_logging_n_layers": 4,
    }
    patcher = c.patcher_config
    entropy = {
        "dim": patcher.hidden_size,
        "n_layers": patcher.num_hidden_layers,
        "n_heads": patcher.num_attention_heads,
        "n_kv_heads": patcher.num_key_value_heads,
        "norm_eps": patcher.rms_norm_eps,
        "vocab_size": 260,
        "max_seqlen": 8192,
        "multiple_of": 16,
        "ffn_dim_multiplier": 0.5,
        "sliding_window": patcher.sliding_window,
    }
    return blt, entropy


def save_official(model, folder, blt_changes=(), entropy_changes=(), dtype=torch.float32):
    """The folders of the Hub: ``blt`` and ``entropy``."""
    weights = official_weights(model)
    args = official_args(model)
    changes = (blt_changes, entropy_changes)
    for name, tensors, options, change in zip(
        ("blt", "entropy"), weights, args, changes, strict=True
    ):
        (folder / name).mkdir(parents=True)
        settled = {"args": {**options, **dict(change)}}
        (folder / name / "config.json").write_text(json.dumps(settled))
        contiguous = {k: v.to(dtype).contiguous() for k, v in tensors.items()}
        save_file(contiguous, folder / name / "model.safetensors")
    return folder / "blt", folder / "entropy"


def save_consolidated(model, folder):
    """The form the official training code writes, the entropy model within the BLT's folder."""
    (blt, scorer), (args, entropy) = official_weights(model), official_args(model)
    patcher = {"threshold": model.config.patching_threshold, "patch_size": 4.5}
    inner = folder / "entropy_model"
    inner.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps({"model": {**args, "patching_threshold": 9.9}}))
    torch.save({"model": {k: v.clone() for k, v in blt.items()}}, folder / "consolidated.pth")
    params = {"entropy_model": entropy, "data": {"patcher_args": patcher}, "optim": {"lr": 1}}
    (inner / "params.json").write_text(json.dumps(params))
    scorer = {k: v.clone() for k, v in scorer.items()} | {"rope.freqs_cis": torch.zeros(3)}
    torch.save({"model": scorer}, inner / "consolidated.pth")
    return folder
