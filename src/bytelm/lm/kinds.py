"""Language models of bytes, patches and tokens.

Training, evaluation, generation and checkpoints use one base class, :class:`CausalLM`. It hides
what differs between models of bytes, patches and tokens: their units, the part that is trained,
their forward pass, their decoding state, and their scorer.
"""

import copy
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.inference import (
    DecodingState,
    PagedMemory,
    PatchedState,
    Strategy,
    TransformerState,
)
from bytelm.model.attention import RowsContext
from bytelm.model.blt import BLT
from bytelm.model.transformer import Transformer
from bytelm.patching import Patcher, Patches, Scorer, build_patches, row_positions
from bytelm.scoring import TransformerScorer
from bytelm.tokens import Tokenizer
from bytelm.units import ByteUnits, PatchUnits, TokenUnits, Units


class CausalLM(nn.Module):
    """Base class of language models: ids in, logits of the next id out."""

    units: Units
    """Units that the model reads."""
    tokenizer: Tokenizer | None = None
    """Tokenizer of a token model."""
    can_predict: bool = True
    """Whether the model has logits; false for scorers, which have entropies only."""
    takes_targets: bool = False
    """Whether the forward pass takes ``targets``, and then returns their nats instead of logits."""

    @property
    def trained(self) -> nn.Module:
        """The part that is trained."""
        raise NotImplementedError

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules whose weights a checkpoint holds, by the name of their file."""
        return {"model": self.trained}

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        tensors = chain(self.trained.parameters(), self.trained.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def forward(
        self,
        ids: Int[Tensor, "batch ids"],
        documents: Int[Tensor, "batch ids"] | None = None,
    ) -> Float[Tensor, "batch ids vocab"]:
        """Return the logits, in fp32, of the id after each.

        A model whose units are :class:`bytelm.units.PatchUnits` takes two more arguments, which
        training and evaluation pass by name: ``next_boundary``, whether the byte after each starts
        a patch, and ``num_patches``, the patches to make room for in a row
        (:attr:`bytelm.data.Batch.inputs`).

        Args:
            ids: packed rows.
            documents: document of each id; ``None`` for one document per row.
        """
        raise NotImplementedError

    def new_state(
        self,
        num_slots: int = 1,
        strategy: Strategy = "auto",
        memory: PagedMemory | None = None,
    ) -> DecodingState:
        """Return a decoding state with ``num_slots`` empty documents.

        Args:
            num_slots: number of documents to decode at once.
            strategy: how single ids are run; see :data:`bytelm.inference.Strategy`.
            memory: bounded memory that states share; one whose slots have a fixed size ignores it.
        """
        raise NotImplementedError

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return the scorer of the model, or the model as a scorer.

        Args:
            reset_at_newline: whether a newline begins a new context, if the model itself is the
                scorer; ignored if it has one.

        Raises:
            ConfigError: the model has no scorer and cannot serve as one.
        """
        raise NotImplementedError


class ByteLM(CausalLM):
    """A plain transformer over bytes."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.units = ByteUnits()

    @property
    def trained(self) -> Transformer:
        """The transformer."""
        return self.transformer

    def forward(
        self,
        ids: Int[Tensor, "batch ids"],
        documents: Int[Tensor, "batch ids"] | None = None,
    ) -> Float[Tensor, "batch ids vocab"]:
        return self.transformer(ids, documents)

    def new_state(
        self,
        num_slots: int = 1,
        strategy: Strategy = "auto",
        memory: PagedMemory | None = None,
    ) -> TransformerState:
        """Return a decoding state with ``num_slots`` empty documents."""
        return TransformerState(self.transformer, num_slots, strategy, memory)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return the transformer as a scorer."""
        return TransformerScorer(self.transformer, reset_at_newline=reset_at_newline)


CHUNKED_VOCAB = 16_384
"""Size of a vocabulary from which the logits of all positions are too many to keep."""


class TokenLM(ByteLM):
    """A plain transformer over byte-pair tokens: the baseline with a tokenizer.

    With a vocabulary of :data:`CHUNKED_VOCAB` tokens or more, training and evaluation compute the
    nats of targets without all logits in memory at once.
    """

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer) -> None:
        super().__init__(transformer)
        self.tokenizer = tokenizer
        self.units = TokenUnits(tokenizer)
        self.takes_targets = transformer.output.out_features >= CHUNKED_VOCAB

    def forward(
        self,
        ids: Int[Tensor, "batch ids"],
        documents: Int[Tensor, "batch ids"] | None = None,
        targets: Int[Tensor, "batch ids"] | None = None,
    ) -> Float[Tensor, "batch ids vocab"] | Float[Tensor, "batch ids"]:
        """Return the logits, in fp32, of the token after each, or the nats of targets.

        Args:
            ids: packed rows.
            documents: document of each token; ``None`` for one document per row.
            targets: token after each, or ``IGNORED``. If given, the result is the negative
                log-likelihood of each, in nats; 0 where it is ignored.
        """
        return self.transformer(ids, documents, targets)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("token models have no byte entropies; load a byte model or a BLT")


class Segmentation(NamedTuple):
    """Entropies, if the rule needs them, and patches of packed rows."""

    entropies: Float[Tensor, "batch bytes"] | None
    patches: Patches


class PatchedLM(CausalLM):
    """A BLT with its patching rule and scorer.

    A rule that is a module becomes part of the BLT, and is trained and saved with it. If it is
    learned (:attr:`bytelm.patching.Patcher.is_learned`), patches are computed in the forward pass,
    not when rows are packed.
    """

    def __init__(self, blt: BLT, patcher: Patcher, scorer: Scorer | None) -> None:
        super().__init__()
        if patcher.needs_entropies and scorer is None:
            raise ValueError("an entropy rule needs a scorer")
        self.blt = blt
        if isinstance(patcher.rule, nn.Module):
            blt.add_module("boundary_rule", patcher.rule)
        self.patcher = patcher
        self.scorer = scorer
        self.units = ByteUnits() if patcher.is_learned else PatchUnits(patcher)

    @property
    def trained(self) -> BLT:
        """The BLT."""
        return self.blt

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The BLT, and the scorer if there is one."""
        scorer = {"scorer": self.scorer} if isinstance(self.scorer, nn.Module) else {}
        return {"model": self.blt, **scorer}

    def segment(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
        states: Float[Tensor, "batch bytes dim"] | None = None,
    ) -> Segmentation:
        """Score the bytes, apply the rule, build the patches.

        Args:
            ids: packed rows.
            documents: document of each byte; ``None`` for one document per row.
            states: the encoder's states, for a rule that reads them; ``None`` to compute them.
        """
        if states is None and self.patcher.needs_states:
            states = self.encoder_states(ids, documents)
        entropies = None
        if self.patcher.needs_entropies:
            assert self.scorer is not None
            with torch.no_grad():
                entropies = self.scorer.entropies(ids, documents)
        next_boundary = self.patcher.next_boundary(ids, entropies, documents, states)
        return Segmentation(entropies, build_patches(next_boundary, documents))

    def encoder_states(
        self,
        ids: Int[Tensor, "batch bytes"],
        documents: Int[Tensor, "batch bytes"] | None = None,
    ) -> Float[Tensor, "batch bytes dim"]:
        """Return the encoder's states of packed rows, which a patching rule may read."""
        return self._encode(ids, documents)[0][-1]

    def _encode(
        self, ids: Int[Tensor, "batch bytes"], documents: Int[Tensor, "batch bytes"] | None
    ) -> tuple[list[Float[Tensor, "batch bytes dim"]], RowsContext]:
        if documents is None:
            documents = torch.zeros_like(ids)
        return self.blt.encode(ids, documents, row_positions(documents))

    def forward(
        self,
        ids: Int[Tensor, "batch ids"],
        documents: Int[Tensor, "batch ids"] | None = None,
        next_boundary: Bool[Tensor, "batch ids"] | None = None,
        num_patches: int | None = None,
    ) -> Float[Tensor, "batch ids vocab"]:
        """Return the logits, in fp32, of the id after each.

        Args:
            ids: packed rows.
            documents: document of each id; ``None`` for one document per row.
            next_boundary: whether the byte after each starts a patch; ``None`` to compute it.
            num_patches: patches to make room for in a row; ``None`` to count them.
        """
        if next_boundary is not None:
            return self.blt(ids, build_patches(next_boundary, documents, num_patches))
        if not self.patcher.is_learned:
            return self.blt(ids, self.segment(ids, documents).patches)
        states, context = self._encode(ids, documents)
        patches = self.segment(ids, documents, states[-1]).patches
        return self.blt.predict(ids, states, patches, context)

    def new_state(
        self,
        num_slots: int = 1,
        strategy: Strategy = "auto",
        memory: PagedMemory | None = None,
    ) -> PatchedState:
        """Return a decoding state with ``num_slots`` empty documents."""
        return PatchedState(self.blt, self.patcher, self.scorer, num_slots, strategy, memory)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return the scorer.

        Raises:
            ConfigError: the model has no scorer, since its rule needs no entropies.
        """
        if self.scorer is None:
            raise ConfigError(
                "this model has no scorer, since its patching rule needs no entropies: use another "
                "rule, or load an entropy model to apply an entropy rule"
            )
        return self.scorer


class ScorerLM(CausalLM):
    """A scorer by itself, which has entropies but no logits."""

    can_predict = False

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer
        self.units = ByteUnits()

    @property
    def trained(self) -> nn.Module:
        """The scorer."""
        return self.scorer

    def forward(
        self,
        ids: Int[Tensor, "batch ids"],
        documents: Int[Tensor, "batch ids"] | None = None,
    ) -> Float[Tensor, "batch ids vocab"]:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(CANNOT_PREDICT)

    def new_state(
        self,
        num_slots: int = 1,
        strategy: Strategy = "auto",
        memory: PagedMemory | None = None,
    ) -> DecodingState:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(CANNOT_PREDICT)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return the scorer, or a copy that shares its weights if its flag is a different one.

        Raises:
            ConfigError: the scorer has no ``reset_at_newline``, which must then be chosen when it
                is built.
        """
        scorer: Any = self.scorer
        own = getattr(scorer, "reset_at_newline", None)
        if own is None and reset_at_newline:
            raise ConfigError(
                "this scorer resets its context at newlines only if it is built so: load it with "
                "load_scorer(path, reset_at_newline=True)"
            )
        if own is not None and own != reset_at_newline:
            scorer = copy.copy(scorer)
            scorer.reset_at_newline = reset_at_newline
        return scorer


CANNOT_PREDICT = (
    "an n-gram scorer has entropies only: it can patch text, not predict it; load a language model"
)
