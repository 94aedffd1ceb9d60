import json
import os
from typing import Literal

import pytest
import torch

import bytelm
from builders import (
    BLT_VARIANTS,
    blt_config,
    fitted_ngram_scorer,
    random_blt,
    random_byte_lm,
    random_ids,
    random_patched,
    random_transformer,
)
from bytelm import codec, cpu
from bytelm.checkpoint import (
    find_checkpoint,
    fingerprint,
    load_model,
    load_scorer,
    load_tensors,
    save_model,
    save_scorer,
    save_tensors,
    saved_steps,
)
from bytelm.config import (
    EntropyPatching,
    FittedNgramConfig,
    ModelDescription,
    NgramConfig,
    Node,
    ScorerConfig,
    SpacePatching,
    TransformerConfig,
)
from bytelm.errors import CheckpointError, ConfigError
from bytelm.lm import ScorerLM
from bytelm.patching import EntropyRule, SpaceRule
from bytelm.scoring import (
    ContextScorer,
    NgramScorer,
    build_scorer,
    fit_ngram_scorer,
    register_scorer,
)
from bytelm.scoring.transformer import split_at_newlines
from bytelm.storage import FILES, atomic_folder, write_json

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "window": 8}
SCORER = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "window": 6}


def patched_description(model, variant="base"):
    rule = model.patcher.rule
    patching = SpacePatching()
    if isinstance(rule, EntropyRule):
        patching = EntropyPatching(threshold=rule.threshold, max_length=model.patcher.max_length)
    return ModelDescription(
        model=blt_config(variant),
        patching=patching,
        scorer=ScorerConfig(model=TransformerConfig(**SCORER), reset_at_newline=True),
        context_bytes=64,
    )


def saved(tmp_path, variant="base"):
    model = cpu.fuse(random_patched(variant, reset=True, max_length=5))
    save_model(tmp_path / "m", model, patched_description(model, variant))
    return model, tmp_path / "m"


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_a_saved_model_gives_the_same_logits(tmp_path, variant):
    model, folder = saved(tmp_path, variant)
    loaded, config = load_model(folder)
    ids = random_ids(70)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert config.context_bytes == 64
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_rule_without_entropies_saves_no_scorer(tmp_path):
    model = cpu.fuse(random_patched(rule=SpaceRule()))
    model.scorer = None
    save_model(
        tmp_path / "m", model, ModelDescription(model=blt_config(), patching=SpacePatching())
    )
    assert not (tmp_path / "m" / "scorer.safetensors").exists()
    ids = random_ids(40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")[0](ids), model(ids))


@pytest.mark.parametrize("model", [random_blt, random_transformer])
def test_embeddings_under_their_older_names_are_read(tmp_path, model):
    module = model()
    tensors = module.state_dict()
    table = "embedding.bytes.weight" if model is random_blt else "embedding.weight"
    older = {name.replace("embedding.ids.weight", table): x for name, x in tensors.items()}
    assert older.keys() != tensors.keys()
    save_tensors(tmp_path / "model", older)
    read = load_tensors(tmp_path / "model", module)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], x) for name, x in tensors.items())
    save_tensors(tmp_path / "moments", {f"{name}/exp_avg": x for name, x in older.items()})
    moments = load_tensors(tmp_path / "moments", module)
    assert moments.keys() == {f"{name}/exp_avg" for name in tensors}


class LineConfig(Node):
    """A user's scorer of bytes by their position, which reads the flag when it is built."""

    kind: Literal["line"] = "line"


class LineScorer(ContextScorer):
    context = 3

    def __init__(self, restart):
        super().__init__()
        self.restart = restart

    def document_starts(self, ids, documents):
        return split_at_newlines(ids, documents) if self.restart else documents

    def score(self, ids, positions):
        return positions.clamp(max=self.context).float()


register_scorer(LineConfig, lambda config, reset_at_newline: LineScorer(reset_at_newline))


@pytest.mark.parametrize("reset", [False, True])
def test_a_registered_scorer_is_loaded_as_its_configuration_says(reset, tmp_path):
    save_model(tmp_path / "s", ScorerLM(LineScorer(False)), ModelDescription(model=LineConfig()))
    scorer, config = load_scorer(tmp_path / "s", reset_at_newline=reset)
    ids = torch.from_numpy(codec.encode(b"abcd\nefgh\n\nij"))[None]
    assert torch.equal(scorer.entropies(ids), build_scorer(config).entropies(ids))
    assert torch.equal(scorer.entropies(ids), LineScorer(reset).entropies(ids))
    loaded = bytelm.load(tmp_path / "s")  # which holds no tensors
    assert loaded.entropies("abcde").tolist() == [0, 1, 2, 3, 3, 3]


def test_a_scorer_that_was_handed_out_does_not_change():
    lm = ScorerLM(fitted_ngram_scorer())
    handed_out = [lm.get_scorer(reset_at_newline=reset) for reset in (True, False, True)]
    assert [scorer.reset_at_newline for scorer in handed_out] == [True, False, True]
    assert all(scorer.keys is lm.scorer.keys for scorer in handed_out)
    with pytest.raises(ConfigError, match="reset_at_newline=True"):
        ScorerLM(LineScorer(False)).get_scorer(reset_at_newline=True)


def test_transformers_and_ngram_scorers_are_models_and_scorers(tmp_path):
    transformer = cpu.fuse(random_byte_lm())
    save_model(tmp_path / "t", transformer, ModelDescription(model=TransformerConfig(**SMALL)))
    ngrams = fit_ngram_scorer([random_ids(500, num_values=20).numpy()], NgramConfig(max_order=2))
    config = FittedNgramConfig(max_order=2, num_contexts=len(ngrams.keys))
    save_model(tmp_path / "n", ScorerLM(ngrams), ModelDescription(model=config))
    ids = random_ids(60, num_values=20)[None]
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "t")[0](ids), transformer(ids))
        scorer, _ = load_scorer(tmp_path / "n", reset_at_newline=False)
        assert torch.equal(scorer.entropies(ids), ngrams.entropies(ids))
        loaded = load_model(tmp_path / "n")[0]
        assert isinstance(loaded, ScorerLM)
        assert isinstance(loaded.get_scorer(), NgramScorer)
        assert len(ngrams.keys) > 10
        with pytest.raises(ConfigError, match="has entropies only"):
            loaded(ids)
        with pytest.raises(ConfigError, match="has entropies only"):
            loaded.new_state()
        assert fingerprint(tmp_path / "n") != fingerprint(tmp_path / "t")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "scorer.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_damage_is_named_with_a_remedy(tmp_path, name, damage):
    _, folder = saved(tmp_path)
    path = folder / name
    data = bytearray(path.read_bytes())
    match damage:
        case "truncate":
            path.write_bytes(data[:-10])
        case "flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged|missing).*restore it"):
        load_model(folder)


def reseal(folder):
    """Write ``files.json`` anew, as if the folder had been saved as it is."""
    os.remove(folder / FILES)
    other = folder.with_name("resealed")
    with atomic_folder(other) as temporary:
        for path in folder.iterdir():
            (temporary / path.name).write_bytes(path.read_bytes())
    return other


def test_another_format_is_named(tmp_path):
    _, folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "format": 7, "bytelm": "9.9"})
    with pytest.raises(
        CheckpointError, match=r"has format 7, this version of bytelm reads 1.*9\.9"
    ):
        load_model(reseal(folder))


def test_an_unknown_configuration_key_is_named(tmp_path):
    _, folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["local"]["windw"] = 3
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=r"unknown key 'model\.local\.windw'.*'window'"):
        load_model(reseal(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.norm.weight"), "decoder.norm.weight is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "extra is unknown"),
        (
            lambda w: w.update({"decoder.norm.weight": torch.ones(5)}),
            r"decoder.norm.weight has shape \[5\], not \[32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    model, folder = saved(tmp_path)
    weights = dict(model.blt.state_dict())
    change(weights)
    save_tensors(folder / "model.safetensors", weights)
    with pytest.raises(CheckpointError, match=message):
        load_model(reseal(folder))


def test_folders_that_are_no_checkpoint_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no files\.json"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has not saved a checkpoint yet"):
        find_checkpoint(tmp_path)


def test_a_file_is_no_checkpoint(tmp_path):
    _, folder = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"it is a file of one; name the folder, \S+/m$"):
        load_model(folder / "model.safetensors")
    (tmp_path / "weights.pth").touch()
    with pytest.raises(CheckpointError, match="it is a file, and a checkpoint is a folder"):
        load_model(tmp_path / "weights.pth")


def test_a_folder_of_checkpoints_names_them(tmp_path):
    """Such as that of a quickstart, in which several models are."""
    for name in ("blt", "byte"):
        _, folder = saved(tmp_path)
        folder.rename(tmp_path / name)
    (tmp_path / "notes").mkdir()
    with pytest.raises(CheckpointError, match=r"holds some: name one of \S+/blt, \S+/byte$"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["files.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "3", '{"model.safetensors": 3}', "null"])
def test_records_of_another_shape_are_named(tmp_path, name, content):
    _, folder = saved(tmp_path)
    (folder / name).write_text(content)
    if name == "config.json":
        folder = reseal(folder)
    with pytest.raises(CheckpointError, match=rf"{name} (is damaged|has format)"):
        load_model(folder)


def test_other_folders_among_the_checkpoints_are_left_out(tmp_path):
    for name in ("step-00000020", "step-00000100", "step-old", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [p.name for p in saved_steps(tmp_path)] == ["step-00000020", "step-00000100"]


def test_the_folder_of_the_checkpoints_names_the_newest(tmp_path):
    for step in (20, 100):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert find_checkpoint(tmp_path / "checkpoints") == find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path).name == "step-00000100"


def test_the_scorer_of_a_blt_is_the_one_it_was_trained_with(tmp_path):
    model, folder = saved(tmp_path)
    scorer, config = load_scorer(folder, reset_at_newline=False)
    assert config.reset_at_newline
    ids = random_ids(60)[None]
    with torch.no_grad():
        assert torch.equal(scorer.entropies(ids), model.scorer.entropies(ids))
    save_scorer(tmp_path / "alone", scorer, config)
    alone, again = load_scorer(tmp_path / "alone", reset_at_newline=True)
    assert again == config
    with torch.no_grad():
        assert torch.equal(alone.entropies(ids), scorer.entropies(ids))


def test_a_blt_without_a_scorer_is_no_scorer(tmp_path):
    model = random_patched(rule=SpaceRule())
    model.scorer = None
    description = ModelDescription(model=blt_config(), patching=SpacePatching())
    save_model(tmp_path / "m", model, description)
    with pytest.raises(CheckpointError, match="holds a blt model, not a scorer"):
        load_scorer(tmp_path / "m", reset_at_newline=False)


def test_nothing_is_overwritten(tmp_path):
    model, folder = saved(tmp_path)
    with pytest.raises(CheckpointError, match="exists: choose another name"):
        save_model(folder, model, patched_description(model))


@pytest.mark.parametrize("moment", range(8))
def test_a_failure_at_any_moment_of_a_save_leaves_nothing_behind(tmp_path, monkeypatch, moment):
    """The disk refuses the n-th flush; afterwards only whole folders exist, and a retry works."""
    fsync, calls = os.fsync, []

    def refuse(descriptor):
        calls.append(descriptor)
        if len(calls) == moment + 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    messages = []
    try:
        saved(tmp_path)
    except CheckpointError as error:
        messages.append(str(error))
    assert all("No space left on device; nothing was changed" in m for m in messages)
    assert bool(messages) != (tmp_path / "m").exists()
    if (tmp_path / "m").exists():
        load_model(tmp_path / "m")
    else:
        assert os.listdir(tmp_path) == []
        monkeypatch.setattr(os, "fsync", fsync)
        saved(tmp_path)


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    left = tmp_path / ".writing-m"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    _, folder = saved(tmp_path)
    load_model(folder)
    assert os.listdir(tmp_path) == ["m"]
