"""Every shipped recipe parses, builds on the meta device, and has the size it claims."""

import pytest
import torch

from bytelm.accounting import parameter_counts, parameters_by_part, training_flops
from bytelm.config import (
    BLTConfig,
    CalibratedPatching,
    ModelDescription,
    NgramRecipe,
    StaticPatching,
    load_recipe,
    recipe_names,
    recipe_text,
)
from bytelm.lm import build_lm

# Paper, Table 10: parameters of encoder, global model and decoder as 12 * layers * width^2.
TABLE_10 = {
    "blt-400m": (7e6, 470e6, 50e6),
    "blt-1b": (12e6, 1.3e9, 113e6),
    "blt-2b": (12e6, 2.0e9, 113e6),
    "blt-4b": (12e6, 4.1e9, 113e6),
    "blt-8b": (20e6, 6.4e9, 120e6),
}


def on_meta(name):
    """Build a recipe's network without memory."""
    config = load_recipe(name).model
    patching = StaticPatching(length=4) if config.has_patches else None
    with torch.device("meta"):
        return build_lm(ModelDescription(model=config, patching=patching)).trained


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_builds_and_says_what_it_is_and_how_to_run_it(name):
    recipe = load_recipe(name)
    first, second, *_ = recipe_text(name).splitlines()
    assert first.startswith("# ")
    assert second.startswith(f"#   bytelm train {name} ")
    if isinstance(recipe, NgramRecipe):
        return
    matrices, embeddings = parameter_counts(recipe.model)
    assert matrices + embeddings == num_parameters(on_meta(name))
    assert sum(parameters_by_part(recipe.model).values()) == num_parameters(on_meta(name))
    if isinstance(recipe.patching, CalibratedPatching):
        assert recipe.patching.patch_size is not None
    assert training_flops(recipe.model, recipe.data.row_bytes, recipe.data.row_bytes // 4) > 0


@pytest.mark.parametrize("name", TABLE_10)
def test_the_papers_models_have_the_papers_sizes(name):
    config = load_recipe(name).model
    assert isinstance(config, BLTConfig)
    sizes = (
        12 * config.local.encoder_layers * config.local.dim**2,
        12 * config.global_model.num_layers * config.global_model.dim**2,
        12 * config.local.decoder_layers * config.local.dim**2,
    )
    for ours, theirs in zip(sizes, TABLE_10[name], strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("name", ["blt-1b", "blt-1b-released"])
def test_the_1b_model_has_the_released_parameter_counts(name):
    blt = on_meta(name)
    ngrams = num_parameters(blt.encoder.embedding.ngrams)
    assert ngrams == 6 * 500_002 * 1024
    assert num_parameters(blt.encoder) - ngrams == pytest.approx(19.4e6, rel=0.002)
    assert num_parameters(blt.global_model) == pytest.approx(1.2846e9, rel=0.001)
    assert num_parameters(blt.decoder) == pytest.approx(157.9e6, rel=0.001)


def test_the_entropy_model_has_the_released_parameter_count():
    assert num_parameters(on_meta("entropy-100m")) == pytest.approx(99.5e6, rel=0.001)


def test_released_models_carry_the_conventions_of_their_weights():
    for name in ("blt-1b-released", "blt-7b-released"):
        recipe = load_recipe(name)
        assert isinstance(recipe.model, BLTConfig)
        assert recipe.model.cross_attention.residual == "doubled"
        assert recipe.model.hash_embeddings.combine == "sum"
        assert recipe.model.local.window == 512
        assert recipe.patching is not None
        assert recipe.patching.model_dump()["threshold"] == 1.335442066192627
        # The folder that the recipe's first command makes.
        assert recipe.init is not None
        assert f" --out {recipe.init.checkpoint}\n" in recipe_text(name)
        assert load_recipe(name, ["init=null"]).init is None


@pytest.mark.parametrize(
    ("name", "millions"), [("blt-1m", 1), ("blt-3m", 3), ("blt-10m", 10), ("blt-30m", 30)]
)
def test_small_models_have_about_the_size_in_their_name(name, millions):
    counts = parameters_by_part(load_recipe(name).model)
    without_tables = sum(counts.values()) - counts["hash embeddings"]
    assert without_tables == pytest.approx(millions * 1e6, rel=0.2)
