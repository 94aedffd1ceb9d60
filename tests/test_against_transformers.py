"""Logits and gradients against an independent implementation: `transformers`' BLT.

Exact where that implementation is: uncached, one document a row, no patch limit.
"""

import pytest
import torch
import transformers

from builders import BASE_BLT, ids_of, merged, random_ids, threshold_between
from bytelm.config import BLTConfig, TransformerConfig, parse
from bytelm.model.blt import BLT
from bytelm.model.patched import PatchedModel
from bytelm.model.scorers import TransformerScorer
from bytelm.model.transformer import Transformer
from bytelm.patching import EntropyRule, Patcher

RELEASED = {"cross_attention": {"residual": "doubled"}}
VARIANTS = {
    "projection": {"cross_attention": {"slots": 2}},
    "no projection": {"cross_attention": {"slots": 2}, "global_model": {"dim": 64}},
    "one slot": {"cross_attention": {"slots": 1}},
    "four slots": {"cross_attention": {"slots": 4}},
    "two encoder layers": {"local": {"encoder_layers": 2}},
    "two hash functions": {"ngrams": {"functions": 2}},
}
SCORER = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "window": 6}


def their_config(ours: BLTConfig, threshold: float):
    def stack(config, **more):
        return {
            "hidden_size": config.dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_heads,
            "head_dim": config.dim // config.num_heads,
            "intermediate_size": config.ffn_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            **more,
        }

    local, slots, width = ours.local, ours.cross_attention.slots, ours.global_model.dim
    between = {"hidden_size_global": width, "cross_attn_k": slots}
    needs_projection = local.dim * slots != width
    return transformers.BltConfig(
        cross_attn_k=slots,
        encoder_hash_byte_group_size=list(ours.ngrams.sizes),
        encoder_hash_byte_group_vocab=ours.ngrams.rows,
        encoder_hash_byte_group_nb_functions=ours.ngrams.functions,
        patching_threshold=threshold,
        encoder_config=stack(local.stack(local.encoder_layers), **between)
        | {"sliding_window": local.window, "cross_attn_all_layers": False},
        decoder_config=stack(local.stack(local.decoder_layers), **between)
        | {"sliding_window": local.window, "cross_attn_all_layers": True},
        global_config=stack(
            ours.global_model, encoder_cross_output_size=width if needs_projection else None
        ),
        patcher_config=stack(TransformerConfig(**SCORER, rope_theta=10_000.0))
        | {"sliding_window": SCORER["window"]},
        local_attention_window_len=local.window,
    )


def our_weights(theirs):
    """Their state dict under our names."""

    def blocks(prefix, name):
        layers = {}
        for key, value in theirs.items():
            if key.startswith(f"{prefix}.layers."):
                index, rest = key.removeprefix(f"{prefix}.layers.").split(".", 1)
                layers.setdefault(index, {})[rest.removesuffix(".weight")] = value
        for index, w in layers.items():
            attention = [w[f"self_attn.{x}_proj"] for x in "qkv"]
            yield f"{name}.{index}.attention.qkv.weight", torch.cat(attention)
            yield f"{name}.{index}.attention.out.weight", w["self_attn.o_proj"]
            gate_up = torch.cat([w["mlp.gate_proj"], w["mlp.up_proj"]])
            yield f"{name}.{index}.feed_forward.gate_up.weight", gate_up
            yield f"{name}.{index}.feed_forward.down.weight", w["mlp.down_proj"]
            yield f"{name}.{index}.attention_norm.weight", w["input_layernorm"]
            yield f"{name}.{index}.feed_forward_norm.weight", w["post_attention_layernorm"]

    def cross(prefix, name):
        for index in range(9):
            at = f"{prefix}.cross_attn_layers.{index}"
            if f"{at}.q_proj.weight" not in theirs:
                return
            for ours, key in {"query": "q_proj", "out": "o_proj", "query_norm": "q_norm"}.items():
                yield f"{name}.{index}.{ours}.weight", theirs[f"{at}.{key}.weight"]
            yield f"{name}.{index}.key_value_norm.weight", theirs[f"{at}.k_norm.weight"]
            key_value = [theirs[f"{at}.{x}_proj.weight"] for x in "kv"]
            yield f"{name}.{index}.key_value.weight", torch.cat(key_value)

    single = {
        "blt.encoder.embedding.bytes": "model.local_encoder.embed_tokens",
        "blt.encoder.embedding.ngrams": "model.encoder_hash_tok_embedding",
        "blt.encoder.pool_projection": "model.local_encoder.patch_embedding_projection",
        "blt.encoder.patch_projection": "model.global_transformer.token_embedding_projection",
        "blt.decoder.latent_projection": "model.local_decoder.patch_embedding_projection",
        "blt.decoder.norm": "model.local_decoder.norm",
        "blt.decoder.output": "lm_head",
        "scorer.transformer.embedding": "model.patcher.embed_tokens",
        "scorer.transformer.norm": "model.patcher.norm",
        "scorer.transformer.output": "model.patcher.lm_head",
    }
    weights = {
        f"{ours}.weight": theirs[f"{key}.weight"]
        for ours, key in single.items()
        if f"{key}.weight" in theirs
    }
    weights.update(blocks("model.local_encoder", "blt.encoder.blocks"))
    weights.update(blocks("model.global_transformer", "blt.global_model.blocks"))
    weights.update(blocks("model.local_decoder", "blt.decoder.blocks"))
    weights.update(blocks("model.patcher", "scorer.transformer.blocks"))
    weights.update(cross("model.local_encoder", "blt.encoder.cross_attention"))
    weights.update(cross("model.local_decoder", "blt.decoder.cross_attention"))
    return weights


@pytest.fixture(params=VARIANTS)
def pair(request):
    """The same random weights in both implementations."""
    options = merged(merged(BASE_BLT, RELEASED), VARIANTS[request.param])
    config = parse(BLTConfig, options, "test")
    scorer = Transformer(TransformerConfig(**SCORER, rope_theta=10_000.0))
    scorer.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        entropies = TransformerScorer(scorer).entropies(random_ids(300)[None])
    threshold = threshold_between(entropies, 0.7)
    theirs = transformers.BltForCausalLM(their_config(config, threshold)).eval()
    for name, parameter in theirs.named_parameters():
        with torch.no_grad():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            if "norm" in name:
                parameter.mul_(0.3).add_(1.0)
    ours = PatchedModel(
        BLT(config), Patcher(EntropyRule(threshold=threshold)), TransformerScorer(scorer)
    )
    ours.load_state_dict(our_weights(theirs.state_dict()))
    return ours.eval(), theirs


def test_logits_and_gradients_equal_transformers(pair):
    ours, theirs = pair
    ids = torch.stack(
        [
            ids_of(b"Daenerys Targaryen is in Game of Thrones, a fantasy epic"),
            torch.cat([torch.tensor([1]), random_ids(56, seed=5) % 256 + 4]),
        ]
    )
    their_logits = theirs(ids, use_cache=False).logits
    our_logits = ours(ids)
    assert ours.segment(ids).patches.counts.min() > 3
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-5)

    for logits in (our_logits, their_logits):
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
    expected = our_weights(
        {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
        | {n: torch.zeros_like(p) for n, p in theirs.named_parameters() if p.grad is None}
    )
    for name, parameter in ours.named_parameters():
        if name.startswith("blt."):
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
