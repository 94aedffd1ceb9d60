"""Parts of a model that a recipe can name: to freeze, at their own learning rate, to begin with."""

from collections.abc import Sequence

from torch import nn

from bytelm.errors import ConfigError


def parts_by_parameter(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the parts that each parameter belongs to, by its name; the narrowest part is first.

    ::

        encoder.embedding.ngrams.weight   hash_embeddings, embeddings
        encoder.embedding.ids.weight      embeddings
        decoder.output.weight             output
        decoder.blocks.0.norm.weight      decoder
        global_model.blocks.0....         global
        vocabulary.embedding.weight       vocabulary
    """
    found: dict[int, tuple[str, ...]] = {}
    for module in model.modules():
        if isinstance(module, nn.EmbeddingBag):
            found[id(module.weight)] = ("hash_embeddings", "embeddings")
        elif isinstance(module, nn.Embedding):
            found[id(module.weight)] = ("embeddings",)
    parts = {}
    for name, parameter in model.named_parameters():
        is_output = name.removeprefix("decoder.") == "output.weight"
        component = name.partition(".")[0].removesuffix("_model")
        by_name = ("output",) if is_output else (component,)
        # Its embeddings are of pieces, not of ids.
        is_vocabulary = component == "vocabulary"
        parts[name] = by_name if is_vocabulary else found.get(id(parameter), by_name)
    return parts


def select(model: nn.Module, parts: Sequence[str], setting: str) -> list[str]:
    """Return the names of the parameters of some parts.

    Args:
        model: the trained module.
        parts: names of parts.
        setting: path of the setting that names them, for messages.

    Raises:
        ConfigError: the model has no parameters in one of the parts.
    """
    by_parameter = parts_by_parameter(model)
    for part in parts:
        if not any(part in belongs for belongs in by_parameter.values()):
            raise ConfigError(f"{setting} names {part!r}, but the model has none: leave it out")
    return [name for name, belongs in by_parameter.items() if set(belongs) & set(parts)]


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Exclude parts from training: they get no gradients, and no state in the optimiser.

    Raises:
        ConfigError: the model has no parameters in one of the parts, or in any other part.
    """
    names = set(select(model, parts, "optimizer.freeze"))
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("optimizer.freeze leaves nothing to train: name fewer parts")
