"""Blocks of the Llama family against those of `transformers`: logits, gradients, cached decoding.

Their models read tokens, so ours are plain transformers of the same vocabulary.
"""

import pytest
import torch
import transformers

from bytelm import cpu
from bytelm.config import RopeScaling, TransformerConfig
from bytelm.inference import TransformerState
from bytelm.model.transformer import Transformer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LLAMA_3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OURS = {
    "dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 300,
    "rope_layout": "half",
}


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))


CASES = {
    "Llama 3.1": (
        lambda: llama(
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA_3},
        ),
        {
            "norm_eps": 1e-5,
            "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=16),
        },
    ),
    "Llama with biases, linear scaling": (
        lambda: llama(
            rms_norm_eps=1e-2,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        ),
        {
            "norm_eps": 1e-2,
            "rope_theta": 10_000.0,
            "rope_scaling": RopeScaling(kind="linear", factor=4.0),
            "qkv_bias": True,
            "out_bias": True,
            "ffn_bias": True,
        },
    ),
    "Mistral, a window": (
        lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(
                **SIZES,
                head_dim=8,
                sliding_window=5,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            )
        ),
        {"norm_eps": 1e-5, "rope_theta": 10_000.0, "window": 5},
    ),
    "Qwen 2": (
        lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(
                **SIZES,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        ),
        {"norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True},
    ),
    "Qwen 3": (
        lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                **SIZES,
                head_dim=12,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        ),
        {"norm_eps": 1e-6, "rope_theta": 1e6, "head_dim": 12, "qk_norm": True},
    ),
}
NAMES = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.query_norm": ("self_attn.q_norm",),
    "attention.key_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "feed_forward_norm": ("post_attention_layernorm",),
    "feed_forward.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.down": ("mlp.down_proj",),
}
SINGLE = {"embedding.ids": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def their_names(ours):
    """The names of the parts that one of our parameters is made of."""
    name, _, kind = ours.rpartition(".")
    if name in SINGLE:
        return [f"{SINGLE[name]}.{kind}"]
    _, layer, leaf = name.split(".", 2)
    return [f"model.layers.{layer}.{part}.{kind}" for part in NAMES[leaf]]


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    make, options = CASES[request.param]
    theirs = make().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        with torch.no_grad():
            parameter.normal_(float("norm" in name), std, generator=generator)
    ours = Transformer(TransformerConfig(**OURS, **options)).eval()
    found = dict(theirs.named_parameters())
    used = []
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parts = their_names(name)
            used += parts
            parameter.copy_(torch.cat([found[part] for part in parts]))
    assert sorted(used) == sorted(found)  # none is left out
    return ours, theirs


IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_equal_theirs(pair):
    ours, theirs = pair
    noise = torch.randn(2, 40, 300, generator=torch.Generator().manual_seed(2))
    logits = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.zero_grad()
        logits[name] = ours(IDS) if model is ours else theirs(IDS, use_cache=False).logits
        (logits[name] * noise).sum().backward()
    torch.testing.assert_close(logits["ours"], logits["theirs"], rtol=1e-4, atol=1e-5)
    found = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = torch.cat([found[part].grad for part in their_names(name)])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("fused", [False, True])
def test_cached_decoding_equals_their_full_pass(pair, fused):
    ours, theirs = pair
    (cpu.fuse if fused else cpu.unfuse)(ours)
    with torch.no_grad():
        expected = theirs(IDS, use_cache=False).logits
    state = TransformerState(ours, num_slots=2)
    for slot in (0, 1):
        logits = state.prefill(slot, IDS[slot, :9])
        torch.testing.assert_close(logits, expected[slot, :9], rtol=1e-4, atol=1e-4)
    for at in range(9, 40):
        logits = state.decode(IDS[:, at])
        torch.testing.assert_close(logits, expected[:, at], rtol=1e-4, atol=1e-4)
    one = TransformerState(ours)
    one.prefill(0, IDS[0, :9])
    for at in range(9, 40):
        logits = one.decode(IDS[:1, at])
        torch.testing.assert_close(logits, expected[:1, at], rtol=1e-4, atol=1e-4)
    cpu.unfuse(ours)
