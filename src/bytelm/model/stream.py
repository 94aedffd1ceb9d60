"""A plain transformer at work on one document: what sessions and entropy models share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.model.graphs import TransformerGraph, can_capture
from bytelm.model.step import TransformerStep, can_step
from bytelm.model.transformer import Transformer


class TransformerStream:
    """A plain transformer at work on one document."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._cache = model.spec.cache()
        self._embedding = model.embedding.stream()
        self._step: TransformerStep | TransformerGraph | None = None
        if can_step(model):
            self._step = TransformerStep(model, self._cache)
        elif can_capture(model):
            self._step = TransformerGraph(model, self._cache)

    @torch.inference_mode()
    def feed(self, ids: Int[Tensor, " ids"]) -> Float[Tensor, "ids vocab"]:
        """Logits of the id after each of the document's next ``ids``."""
        if not len(ids):
            return ids.new_empty(0, self._model.output.out_features, dtype=torch.float32)
        # The first id gives the caches the shapes that steps rely on.
        if len(ids) == 1 and self._step and self._cache.position:
            return self._step(self._embedding.take(int(ids))).clone()
        context = self._cache.extend(len(ids), ids.device)
        return self._model.run(self._embedding.feed(ids), context)[0]

    def clear(self) -> None:
        """Start a new document."""
        self._cache.clear()
        self._embedding.clear()
