"""Plans of runs on several GPUs, checked against small runs."""

import pytest
import torch
from torch.nn import functional

from builders import BASE_BLT, BLT_VARIANTS, SPACE_BLT, merged
from bytelm.accounting import GPUS, RunPlan, plan_run
from bytelm.accounting.parts import model_parts
from bytelm.accounting.plan import kept_elements, kept_in_chunks
from bytelm.config import BLTConfig, Recipe, TransformerConfig, load_recipe, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.errors import ConfigError
from bytelm.layout import saved_steps
from bytelm.model.blt import BLT
from bytelm.model.transformer import Transformer, chunk_positions
from bytelm.patching import build_patches
from bytelm.training import train

ROWS, LENGTH, PATCH = 2, 256, 4
H100 = GPUS["h100"]


def saved_elements(model, loss):
    """Elements of fp32 that the backward pass keeps, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = loss()
    assert result.requires_grad
    return sum(num_bytes for num_bytes, _ in found.values()) / 4


def planned_elements(config):
    positions = {"byte": LENGTH, "patch": LENGTH // PATCH + 1}
    return ROWS * sum(kept_elements(part, positions) for part in model_parts(config).values())


# A vocabulary's distributions are computed in chunks, as are large logits.
@pytest.mark.parametrize("variant", sorted(BLT_VARIANTS.keys() - {"vocabulary"}))
def test_activations_of_a_blt_are_those_that_backward_keeps(variant):
    config = parse(BLTConfig, merged(BASE_BLT, BLT_VARIANTS[variant]), "test")
    model = BLT(config)
    model.init_weights()
    ids = torch.randint(4, 200, (ROWS, LENGTH))
    boundary = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    boundary[:, PATCH - 1 :: PATCH] = True
    patches = build_patches(boundary, torch.zeros_like(ids), LENGTH // PATCH + 1)
    saved = saved_elements(model, lambda: nats(model(ids, patches), ids))
    assert planned_elements(config) == pytest.approx(saved, rel=0.08)


@pytest.mark.parametrize(
    "changes", [{}, {"window": 32}, {"num_kv_heads": 1}, {"num_layers": 1, "ffn_dim": 512}]
)
def test_activations_of_a_transformer_are_those_that_backward_keeps(changes):
    options = {"dim": 128, "num_layers": 3, "num_heads": 4, "ffn_dim": 352}
    config = TransformerConfig(**{**options, **changes})
    model = Transformer(config)
    model.init_weights()
    ids = torch.randint(4, 200, (ROWS, LENGTH))
    saved = saved_elements(model, lambda: nats(model(ids), ids))
    assert planned_elements(config) == pytest.approx(saved, rel=0.08)


def test_activations_of_a_large_vocabulary_are_one_chunk_of_logits_and_all_states(monkeypatch):
    monkeypatch.setattr("bytelm.model.transformer.CHUNK_LOGITS", 2**19)
    config = TransformerConfig(dim=64, num_layers=2, num_heads=2, ffn_dim=176, vocab_size=5000)
    chunk = chunk_positions(64, 5000)
    assert chunk == 104
    model = Transformer(config)
    model.init_weights()
    ids, states = torch.randint(4, 200, (ROWS, LENGTH)), torch.randn(1, chunk, 64)
    # Hooks see nothing inside a checkpoint, nor its arguments.
    saved = saved_elements(model, lambda: model(ids, targets=ids).mean()) + ids.numel() * 64
    saved += saved_elements(model, lambda: nats(model.logits(states), ids.view(1, -1)[:, :chunk]))
    parts = model_parts(config)
    (output,) = parts.pop("output").matrices
    positions = {"byte": LENGTH, "patch": 0}
    planned = ROWS * sum(kept_elements(part, positions) for part in parts.values())
    assert planned + kept_in_chunks(output, ROWS * LENGTH, chunk) == pytest.approx(saved, rel=0.08)


def test_a_plan_counts_the_chunks_of_a_large_vocabulary():
    recipe = load_recipe("token-1m", ["model.vocab_size=16383", "train.precision=float32"])
    larger = load_recipe("token-1m", ["model.vocab_size=16384", "train.precision=float32"])
    before, after = (plan_run(one, 1, H100, 0.3, patch_size=1.0) for one in (recipe, larger))
    positions = before.micro_rows * recipe.data.row_bytes
    assert before.parts["output"].activations > 4 * positions * 16_383
    dim, chunk = larger.model.dim, 1024
    assert after.parts["output"].activations == 4 * (positions * dim + chunk * (dim + 16_384))


def nats(logits, ids):
    return functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def planned(changes=None, num_gpus=1, **options) -> RunPlan:
    values = {"train": {"steps": 10}, "data": {"row_bytes": 64, "rows_per_step": 8}}
    recipe = parse(Recipe, merged(merged(SPACE_BLT, values), changes or {}), "test")
    return plan_run(recipe, num_gpus, H100, 0.4, patch_size=4.0, **options)


def test_checkpoints_have_the_planned_size(tmp_path):
    (tmp_path / "x.txt").write_text("some words " * 300)
    prepare([str(tmp_path / "x.txt")], tmp_path / "d", PrepareOptions(validation_share=0.0))
    values = {"data": {"path": str(tmp_path / "d")}, "train": {"steps": 1}}
    recipe = parse(Recipe, merged(SPACE_BLT, values), "test")
    train(recipe, tmp_path / "run")
    (checkpoint,) = saved_steps(tmp_path / "run")
    for name, wanted in (
        ("model", planned().model_file),
        ("optimizer", planned().optimizer_file),
    ):
        size = (checkpoint / f"{name}.safetensors").stat().st_size
        # The rest is the header.
        assert wanted < size < wanted + 20_000


def test_more_gpus_have_less_each_and_take_less_time():
    one, four = planned(), planned(num_gpus=4)
    assert sum(p.state for p in one.parts.values()) == 16 * one.parameters
    for name, part in one.parts.items():
        assert part.state == 4 * four.parts[name].state
        assert part.activations == 4 * four.parts[name].activations
    assert four.rows == 2
    assert one.days == pytest.approx(4 * four.days)
    assert one.run_bytes == four.run_bytes == 10 * 8 * 64
    assert four.bytes_per_second * four.training_flops == pytest.approx(4 * 989e12 * 0.4)
    copies = planned({"train": {"shard_ranks": 2}}, num_gpus=4)
    assert copies.parts["global"].state == 2 * four.parts["global"].state


def test_settings_that_save_memory_do():
    base = planned({"train": {"micro_rows": 4}}, num_gpus=2)
    half = planned({"train": {"micro_rows": 2}}, num_gpus=2)
    assert base.parts["global"].activations == 2 * half.parts["global"].activations
    deep = {"model": {"global_model": {"num_layers": 8}}}
    kept = {
        kind: planned(merged(deep, {"train": {"activation_checkpointing": kind}}))
        for kind in ("none", "selective", "block")
    }
    sizes = [kept[kind].parts["global"].activations for kind in ("block", "selective", "none")]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.4 * sizes[2]
    keeps = planned({"train": {"reshard": False}}, num_gpus=2)
    assert keeps.gathered > planned(num_gpus=2).gathered


@pytest.mark.parametrize(
    ("name", "num_gpus"), [("blt-1b", 8), ("blt-8b", 64), ("blt-8b", 512), ("entropy-100m", 8)]
)
def test_shipped_recipes_fit(run, name, num_gpus):
    status, out, err = run("plan", name, "--gpus", num_gpus)
    assert (status, err) == (0, "")
    assert "hash embeddings" in out or "transformer" in out
    assert "days" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["blt-8b", "--gpus", "6"], "data.rows_per_step is 1024, which is not a multiple of 6"),
        (["blt-8b", "--gpus", "8", "train.shard_ranks=3"], "number of GPUs is 8, .* of 3"),
        (["blt-8b", "--gpu", "abacus"], "'abacus' is not one of a100, h100"),
        (["blt-8b", "--gpus", "8", "--gpu", "4090"], "needs [0-9]+ GB on each GPU, of which 23 GB"),
        (["token-1m", "--gpus", "1"], "the size of tokens depends on .* --patch-size 3.7"),
        (["entropy-ngram"], "is counted on the CPU"),
    ],
)
def test_what_does_not_fit_is_refused(run, arguments, message):
    status, _, err = run("plan", *arguments)
    assert status == 1
    import re

    assert re.search(message, " ".join(err.split()))


def test_a_plan_of_tokens_counts_tokens():
    recipe = load_recipe("token-1m")
    assert isinstance(recipe, Recipe)
    short, long = (plan_run(recipe, 1, H100, 0.3, patch_size=size) for size in (2.0, 4.0))
    assert short.parts["transformer"].activations == pytest.approx(
        2 * long.parts["transformer"].activations, rel=0.01
    )


def test_a_plan_of_an_unknown_patch_size_is_refused():
    with pytest.raises(ConfigError, match="depends on the text"):
        plan_run(parse(Recipe, {**SPACE_BLT, "train": {"steps": 1}}, "test"), 1, H100, 0.3)
