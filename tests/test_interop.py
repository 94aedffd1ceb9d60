"""Import and export: the same bits there and back, the same logits, and nothing half-written."""

import json
import weakref

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import bytelm
from builders import LearnedRule, blt_config, random_byte_lm, random_ids, random_patched
from bytelm import codec, interop
from bytelm.checkpoint import CheckpointConfig
from bytelm.config import (
    EntropyPatching,
    FittedNgramConfig,
    ModelDescription,
    MonotonicPatching,
    ScorerConfig,
    StaticPatching,
    TransformerConfig,
    load_recipe,
)
from bytelm.data import PrepareOptions, prepare
from bytelm.errors import CheckpointError, ConfigError
from bytelm.interop import huggingface, weights
from bytelm.language_model import LanguageModel
from bytelm.patching import EntropyRule, StaticRule
from bytelm.training import Trainer, train
from foreign import SCALED, VARIANTS, hf_model, save_consolidated, save_official
from test_checkpoint import SCORER


@pytest.fixture(scope="module", params=VARIANTS)
def theirs(request):
    return hf_model(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def model():
    return hf_model()


def logits(lm, length=80):
    with torch.no_grad():
        return lm.module(random_ids(length, seed=3)[None])


def same_tensors(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


def test_every_format_gives_the_same_model(tmp_path, theirs):
    theirs.save_pretrained(tmp_path / "hf")
    blt, entropy = save_official(theirs, tmp_path / "official")
    consolidated = save_consolidated(theirs, tmp_path / "pth")
    lm = interop.import_hf(tmp_path / "hf")
    expected = logits(lm)
    for other in (interop.import_official(blt, entropy), interop.import_official(consolidated)):
        assert other.config.model == lm.config.model
        if lm.config.scorer.model.window:  # the official loader knows no entropy model without
            assert other.config.scorer == lm.config.scorer
        assert other.config.patching.threshold == lm.config.patching.threshold
        assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("variant", [*VARIANTS, *SCALED])
def test_there_and_back_gives_the_same_bits(tmp_path, variant):
    theirs = hf_model(**{**VARIANTS, **SCALED}[variant])
    theirs.save_pretrained(tmp_path / "hf")
    interop.convert_hf(tmp_path / "hf", tmp_path / "ours")
    lm = bytelm.load(tmp_path / "ours", "cpu", "stored")
    interop.export_hf(lm, tmp_path / "back")
    original = load_file(tmp_path / "hf" / "model.safetensors")
    assert same_tensors(load_file(tmp_path / "back" / "model.safetensors"), original)
    again = interop.import_hf(tmp_path / "back")
    assert again.config.model == lm.config.model
    assert again.config.patching == lm.config.patching
    assert again.config.context_bytes == lm.config.context_bytes
    opened = transformers.BltForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids = random_ids(80, seed=3)[None]
    with torch.no_grad():
        their_logits = opened(ids, use_cache=False).logits
        assert torch.equal(their_logits, theirs(ids, use_cache=False).logits)
    torch.testing.assert_close(logits(lm), their_logits, rtol=0, atol=1e-5)


def test_an_imported_model_is_trained_on_from_as_the_released_recipes_say(
    tmp_path, model, monkeypatch
):
    """The commands in the comment of the recipe, on a small model."""
    monkeypatch.chdir(tmp_path)
    blt, entropy = save_official(model, tmp_path / "official")
    interop.convert_official(blt, "blt-1b", entropy)
    text = "\n".join(f"line {n} of a text that is {n * n % 17} letters long" for n in range(60))
    (tmp_path / "text").mkdir()
    for n in range(8):
        (tmp_path / "text" / f"{n}.txt").write_text(text[n:])
    options = PrepareOptions(scorer=tmp_path / "blt-1b", workers=1, validation_share=0.2)
    prepare(["text"], tmp_path / "data", options)
    (tmp_path / "recipe.yaml").write_text(
        "init: {from: blt-1b}\ndata: {path: data, row_bytes: 64}\n"
        "train: {steps: 2, validation_bytes: 500}\noptimizer: {warmup_steps: 1}\n"
    )
    recipe = load_recipe("recipe.yaml")
    first = Trainer(recipe).lm.eval()
    imported = bytelm.load("blt-1b", "cpu")
    with torch.no_grad():
        ids = random_ids(80)[None]
        assert torch.equal(first(ids), imported.module(ids))
    train(recipe, tmp_path / "run")
    tuned = bytelm.load(tmp_path / "run")
    assert tuned.config.patching == imported.config.patching
    assert tuned.config.scorer == imported.config.scorer
    assert np.array_equal(tuned.entropies("some text"), imported.entropies("some text"))
    assert not torch.equal(logits(tuned), logits(imported))


def test_precision_is_kept(tmp_path, model):
    blt, entropy = save_official(model, tmp_path, dtype=torch.bfloat16)
    interop.convert_official(blt, tmp_path / "ours", entropy)
    stored = bytelm.load(tmp_path / "ours", "cpu", "stored")
    assert {p.dtype for p in stored.module.parameters()} == {torch.bfloat16}
    usable = bytelm.load(tmp_path / "ours", "cpu")
    assert {p.dtype for p in usable.module.parameters()} == {torch.float32}
    assert torch.equal(logits(usable), logits(interop.import_official(blt, entropy)))
    half = bytelm.load(tmp_path / "ours", "cpu", "bfloat16").module
    assert {p.dtype for p in half.blt.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.scorer.parameters()} == {torch.float32}
    interop.export_hf(stored, tmp_path / "hf")
    dtypes = {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    assert transformers.BltConfig.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_no_part_and_no_scorer_loses_precision(tmp_path, model):
    blt, entropy = save_official(model, tmp_path)
    path = blt / "model.safetensors"
    name = "local_encoder.layers.0.attention.wq.weight"
    edit_weights(path, lambda t: t.update({name: t[name].bfloat16()}))
    lm = interop.import_official(blt, entropy)
    key = load_file(path)["local_encoder.layers.0.attention.wk.weight"]
    assert torch.equal(lm.module.blt.encoder.blocks[0].attention.qkv.weight[32:64], key)
    lm.module.blt.bfloat16()
    interop.export_hf(lm, tmp_path / "hf")
    opened = transformers.BltForCausalLM.from_pretrained(tmp_path / "hf")
    assert opened.model.patcher.norm.weight.dtype == torch.float32


def test_shards_are_read(tmp_path, model):
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(
        logits(interop.import_hf(tmp_path / "hf")), logits(interop.import_hf(tmp_path / "whole"))
    )
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        interop.import_hf(tmp_path / "hf")


def test_conversion_holds_one_tensor_at_a_time(tmp_path, model, monkeypatch):
    blt, entropy = save_official(model, tmp_path)
    alive, most = set(), 0

    def watched(entry):
        def parts():
            nonlocal most
            for tensor in entry.parts():
                alive.add(key := id(tensor))
                weakref.finalize(tensor, alive.discard, key)
                most = max(most, len(alive))
                yield tensor
                del tensor

        return entry._replace(parts=parts)

    opened = weights.open_weights
    monkeypatch.setattr(
        interop, "open_weights", lambda folder: {k: watched(e) for k, e in opened(folder).items()}
    )
    interop.convert_official(blt, tmp_path / "ours", entropy)
    assert 1 <= most <= 2


def test_a_model_trained_here_opens_in_transformers(tmp_path, model):
    blt, entropy = save_official(model, tmp_path)
    lm = interop.import_official(blt, entropy)
    lm.save(tmp_path / "saved")
    interop.export_hf(bytelm.load(tmp_path / "saved"), tmp_path / "hf")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("Zwölf Boxkämpfer", return_tensors="pt").input_ids
    generated = opened.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, suppress_tokens=[0, 1, 3]
    )
    expected = lm.generate("Zwölf Boxkämpfer", max_bytes=24)
    assert codec.decode(generated[0, ids.shape[1] :]).startswith(expected)
    assert len(expected) > 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("tokenizer")
    blt, entropy = save_official(model, folder)
    interop.export_hf(interop.import_official(blt, entropy), folder / "hf")
    return transformers.AutoTokenizer.from_pretrained(folder / "hf")


@given(text=st.text())
def test_the_tokenizer_gives_bytes(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    ids = tokenizer(text).input_ids
    assert ids == codec.encode(text).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<|bos|>", "a<|eos|>b", " <s> </s>", "  two  spaces\n\n", "\x00"])
def test_no_text_is_special_to_the_tokenizer(tokenizer, text):
    assert tokenizer(text).input_ids == codec.encode(text).tolist()
    assert tokenizer.decode(tokenizer(text).input_ids[1:]) == text


def test_a_hub_name_is_downloaded(tmp_path, model, monkeypatch):
    import huggingface_hub

    model.save_pretrained(tmp_path / "hf" / "inner")
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path / "hf")

    files = ["inner/config.json", "inner/model.safetensors", "inner/old.pth", "config.json"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: files)
    lm = interop.import_hf("someone/blt/inner")
    assert asked == [("someone/blt", ["inner/config.json", "inner/model.safetensors"])]
    assert lm.config.training == {"imported_from": "someone/blt/inner (format of transformers)"}
    with pytest.raises(CheckpointError, match="no folder elsewhere"):
        interop.import_hf("someone/blt/elsewhere")


def test_a_failed_download_is_explained(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_, **__):
        raise GatedRepoError.__new__(GatedRepoError)

    def offline(*_, **__):
        raise OSError("no route to the Hub\nmore")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", gated)
    with pytest.raises(CheckpointError, match=r"gated: accept its licence .*hf auth login"):
        interop.import_official("facebook/blt-1b")
    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(CheckpointError, match=r"could not be downloaded .* no route to the Hub$"):
        interop.import_official("facebook/blt-1b")
    for name in ("nowhere", "./a/b", "a/b/c d", str(tmp_path / "missing")):
        with pytest.raises(CheckpointError, match="neither a folder nor the name"):
            interop.import_hf(name)


BLT_REFUSALS = [
    ({"norm_type": "layernorm"}, "norm_type is 'layernorm', where bytelm supports only 'rmsnorm'"),
    ({"n_kv_heads_global": 1}, r"layers.0.attention.wk.weight has shape \[48, 48\], not \[24"),
    ({"n_heads_global": 3, "n_kv_heads_global": 2}, "must be a multiple of num_kv_heads 2"),
    ({"cross_attn_window_encoder": 2}, "cross_attn_window_encoder is 2"),
    ({"downsampling_by_pooling": "avg"}, "downsampling_by_pooling is 'avg'"),
    ({"cross_attn_init_by_pooling": False}, "cross_attn_init_by_pooling is off"),
    ({"dim_local_decoder": 64}, "dim_local_encoder is 32 and dim_local_decoder 64"),
    ({"vocab_size": 300}, "300 ids where bytelm's has 260"),
    ({"vocab_size": "260"}, "vocab_size is '260', where int is expected"),
    ({"encoder_ngram_to_size_str": "2:100"}, "frequency n-grams"),
    ({"patching_mode": "bpe"}, "patching_mode 'bpe' is not supported"),
    ({"patching_threshold": None}, "no patching threshold"),
    ({"monotonicity": True}, "monotonic rules"),
    ({"patching_threshold_add": 0.3}, "threshold_add"),
    ({"some_new_option": 3}, "some_new_option is 3, an option that bytelm does not know"),
    ({"dim_global": None}, "lacks dim_global"),
    ({"n_heads_global": 5}, "must be num_heads 5 times an even head dimension"),
    ({"rope_theta": True}, "rope_theta is True"),
    ({"n_heads_local_encoder": 0, "n_heads_local_decoder": 0}, "num_heads"),
    ({"multiple_of": 0}, "multiple_of is 0"),
    ({"encoder_hash_byte_group_size": "3;4"}, "hash_embeddings.sizes"),
    ({"max_patch_length": 0}, "max_length"),
    ({"max_encoder_seq_length": -1}, "context_bytes"),
    ({"encoder_hash_byte_group_vocab": 98}, r"encoder_hash_tok_embedding.0.weight has shape \[97"),
    ({"n_layers_global": 3}, r"layers.2.attention.wk.weight is missing; .* more"),
    ({"n_layers_global": 1}, r"global_transformer.layers.1.attention.wk.weight is unknown"),
]


@pytest.mark.parametrize(("change", "message"), BLT_REFUSALS, ids=[str(c) for c, _ in BLT_REFUSALS])
def test_unsupported_official_options_are_refused_by_name(tmp_path, model, change, message):
    blt, entropy = save_official(model, tmp_path, blt_changes=change)
    with pytest.raises(CheckpointError, match=message):
        interop.convert_official(blt, tmp_path / "ours", entropy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blt", "entropy"]


def test_options_that_change_nothing_are_accepted(tmp_path, model):
    changes = {"some_new_option": None, "another": False, "use_fsdp": True, "custom_bwd": True}
    blt, entropy = save_official(model, tmp_path, blt_changes=changes)
    plain = save_official(model, tmp_path / "plain")
    assert torch.equal(
        logits(interop.import_official(blt, entropy)), logits(interop.import_official(*plain))
    )


def test_unsupported_entropy_models_are_refused_by_name(tmp_path, model):
    blt, entropy = save_official(model, tmp_path, entropy_changes={"weight_tying": True})
    with pytest.raises(CheckpointError, match="weight_tying is True"):
        interop.import_official(blt, entropy)
    with pytest.raises(CheckpointError, match="name the folder of its entropy model"):
        interop.import_official(blt)
    with pytest.raises(CheckpointError, match="does not describe an official entropy model"):
        interop.import_official(blt, blt)
    with pytest.raises(CheckpointError, match="does not describe an official BLT"):
        interop.import_official(entropy, entropy)


def test_a_space_patched_model_needs_no_entropy_model(tmp_path, model):
    blt, _ = save_official(model, tmp_path, blt_changes={"patching_mode": "space"})
    lm = interop.import_official(blt)
    assert lm.patch("two words").patches == [b"two ", b"words"]


HF_REFUSALS = [
    ({"patching_mode": "space"}, "patching_mode is 'space'"),
    ({"patch_in_forward": False}, "patch_in_forward is False"),
    ({"vocab_size": 300}, "vocab_size is 300"),
    ({"model_type": "llama"}, "does not describe a BLT of transformers$"),
    ({"encoder_hash_byte_group_vocab": "many"}, "encoder_hash_byte_group_vocab is 'many'"),
    ({"patching_threshold": None}, "patching_threshold is null"),
    ({"max_patch_length": 0}, "max_length"),
    ({"something": [1]}, r"something is \[1\], an option that bytelm does not know"),
    ({"cross_attn_k": 3}, "cross_attn_k is 2, where bytelm supports only 3"),
    ({"encoder_config": {"rms_norm_eps": 1e-6}}, "encoder's eps is 1e-06 and the decoder's 1e-05"),
    ({"encoder_config": {"num_key_value_heads": 1}}, "has 1 key-value heads for 2 heads"),
    (
        {"encoder_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}},
        "the encoder's scaling is .*'linear'.* and the decoder's None",
    ),
    (
        {"global_config": {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}},
        "lacks low_freq_factor",
    ),
    ({"decoder_config": {"intermediate_size": 64}}, "the encoder's ffn is 48 and the decoder's 64"),
    ({"global_config": {"hidden_act": "gelu"}}, "global_config: hidden_act is 'gelu'"),
    (
        {"patcher_config": {"rope_parameters": {"rope_type": "yarn"}}},
        "rope_type 'yarn' is not supported",
    ),
    (
        {"encoder_config": {"cross_attn_all_layers": True, "num_hidden_layers": 2}},
        "pools again before each",
    ),
]


@pytest.mark.parametrize(("change", "message"), HF_REFUSALS, ids=[str(c) for c, _ in HF_REFUSALS])
def test_unsupported_hf_options_are_refused_by_name(tmp_path, model, change, message):
    model.save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        interop.convert_hf(tmp_path / "hf", tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_defaults_are_those_of_transformers(tmp_path):
    # Theirs give encoder and decoder different feed-forwards; the released encoder has 2816.
    config = {"model_type": "blt", "encoder_config": {"intermediate_size": 2816}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = huggingface.read_description(tmp_path)
    theirs = transformers.BltConfig.from_pretrained(tmp_path)
    described, _ = huggingface.describe(ours)
    for name in ("encoder_config", "decoder_config", "global_config", "patcher_config"):
        for key, value in described[name].items():
            if key not in ("max_position_embeddings", "rope_parameters"):
                assert getattr(getattr(theirs, name), key, value) == value, (name, key)
        rope = getattr(theirs, name).rope_parameters or {}
        assert rope.get("rope_theta", 500_000.0) == described[name]["rope_parameters"]["rope_theta"]


def test_folders_of_neither_format_are_refused(tmp_path, model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has neither config.json nor params.json"):
        interop.import_official(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        interop.import_hf(tmp_path / "empty")
    blt, entropy = save_official(model, tmp_path)
    with pytest.raises(CheckpointError, match="bytelm import official"):
        interop.import_hf(blt)
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="bytelm import hf"):
        interop.import_official(tmp_path / "hf", entropy)
    (blt / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        interop.import_official(blt, entropy)
    for text in ("{", "[]", '{"args": 3}', '{"args": {"dim_local_encoder": 3}}'):
        (blt / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            interop.import_official(blt, entropy)


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, model):
    blt, entropy = save_official(model, tmp_path)
    path = entropy / "model.safetensors"
    original = path.read_bytes()
    edit_weights(path, lambda t: t.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"norm.weight is missing"):
        interop.import_official(blt, entropy)
    path.write_bytes(original)
    edit_weights(path, lambda t: t.update({"layers.0.bias": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"layers.0.bias is unknown"):
        interop.import_official(blt, entropy)
    path.write_bytes(original)
    edit_weights(path, lambda t: t.update({"norm.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[3\], not \[32\]"):
        interop.import_official(blt, entropy)
    path.write_bytes(original)
    edit_weights(path, lambda t: t.update({"norm.weight": torch.zeros(32, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"norm.weight is stored as I8"):
        interop.import_official(blt, entropy)
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        interop.import_official(blt, entropy)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a pickle was run')",))


def test_code_in_a_pickle_is_not_run(tmp_path, model):
    folder = save_consolidated(model, tmp_path / "pth")
    path = folder / "consolidated.pth"
    torch.save({"model": {}, "extra": Trap()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        interop.import_official(folder)
    torch.save({"model": [1, 2]}, path)
    with pytest.raises(CheckpointError, match="does not hold named tensors"):
        interop.import_official(folder)
    path.write_bytes(b"PK\x03\x04 not a torch file")
    with pytest.raises(CheckpointError, match="damaged or not a torch file"):
        interop.import_official(folder)


def test_a_full_disk_leaves_nothing(tmp_path, model, monkeypatch):
    blt, entropy = save_official(model, tmp_path)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_tensors", refuse)
    with pytest.raises(CheckpointError, match="free some space"):
        interop.convert_official(blt, tmp_path / "ours", entropy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blt", "entropy"]
    (tmp_path / "ours").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        interop.convert_official(blt, tmp_path / "ours", entropy)


def exported(lm, tmp_path, **changes):
    description = {name: getattr(lm.config, name) for name in ModelDescription.model_fields}
    lm.config = lm.config.model_copy(update={**description, **changes})
    interop.export_hf(lm, tmp_path / "out")


def test_models_transformers_cannot_run_are_refused_by_name(tmp_path, model):
    blt, entropy = save_official(model, tmp_path)
    lm = interop.import_official(blt, entropy)
    rule, config, scorer = lm.config.patching, lm.config.model, lm.config.scorer
    cross = config.cross_attention

    def with_cross(**changes):
        changed = cross.model_copy(update=changes)
        return {"model": config.model_copy(update={"cross_attention": changed})}

    ngrams = config.hash_embeddings.model_copy(update={"combine": "mean"})
    tables = {"hash_embeddings": config.hash_embeddings}
    cases = [
        (with_cross(residual="single"), r"residual=single \(only doubled\)"),
        (with_cross(num_heads=4), "num_heads=4"),
        (with_cross(decoder="none"), "decoder=none"),
        (with_cross(queries="learned"), "queries=learned"),
        ({"model": config.model_copy(update={"hash_embeddings": ngrams})}, "combine=mean"),
        ({"model": scorer.model}, "a transformer model cannot be exported"),
        ({"patching": StaticPatching(length=4)}, "patching.kind=static"),
        ({"patching": EntropyPatching(threshold=1.0, max_length=6)}, "max_length"),
        ({"scorer": scorer.model_copy(update={"reset_at_newline": True})}, "reset_at_newline"),
        (
            {"scorer": scorer.model_copy(update={"model": scorer.model.model_copy(update=tables)})},
            "scorer.model.hash_embeddings",
        ),
    ]
    base = {"patching": rule, "model": config, "scorer": scorer}
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            exported(lm, tmp_path, **{**base, **changes})
    assert not (tmp_path / "out").exists()


NGRAMS = FittedNgramConfig(max_order=3, num_contexts=9)
# Options of the model, its rule, and its scorer.
PATCHERS = {
    "n-gram scorer": ({"ngram_scorer": True}, EntropyPatching(threshold=1.0), NGRAMS),
    "static": ({"rule": StaticRule(3)}, StaticPatching(length=3), None),
    "limited": ({"max_length": 3}, EntropyPatching(threshold=1.0, max_length=3), None),
    "rises": ({"rule": EntropyRule(increase=0.05)}, MonotonicPatching(increase=0.05), None),
}


@pytest.mark.parametrize("name", PATCHERS)
def test_any_rule_and_scorer_is_exported_with_patch_lengths(tmp_path, name):
    options, patching, scorer = PATCHERS[name]
    module = random_patched(**options)
    scorer = scorer or TransformerConfig(**SCORER)
    config = CheckpointConfig(
        model=blt_config(), patching=patching, scorer=ScorerConfig(model=scorer)
    )
    lm = LanguageModel(module, config)
    with pytest.raises(ConfigError, match="--no-patch-in-forward"):
        interop.export_hf(lm, tmp_path / "hf")
    interop.export_hf(lm, tmp_path / "hf", patch_in_forward=False)
    opened = transformers.BltForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert opened.model.patcher is None
    for text in ("the cat sat on\nthe mat", b"\xff\x00 any bytes", "ab", "x"):
        lengths = interop.patch_lengths(lm, text)
        ids = torch.from_numpy(codec.encode(text))[None]
        assert lengths.sum() == ids.shape[1]
        with torch.no_grad():
            found = opened(ids, patch_lengths=lengths, use_cache=False).logits
            torch.testing.assert_close(found, module(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="patch_in_forward"):
        interop.import_hf(tmp_path / "hf")


def test_what_has_no_patches_to_export_is_refused(tmp_path):
    config = CheckpointConfig(model=TransformerConfig(**SCORER))
    with pytest.raises(ConfigError, match="only a BLT has patches"):
        interop.patch_lengths(LanguageModel(random_byte_lm(), config), "text")
    lm = LanguageModel(
        random_patched(rule=LearnedRule(32)),
        CheckpointConfig(model=blt_config(), patching=StaticPatching(length=3)),
    )
    with pytest.raises(ConfigError, match="a learned patching rule cannot be exported"):
        interop.export_hf(lm, tmp_path / "hf", patch_in_forward=False)
    assert not (tmp_path / "hf").exists()
