"""Language models: a network, the units it reads, and how it is put to work.

Everything above this package deals with one protocol, :class:`CausalLM`. What differs between
models of bytes, patches and tokens is behind it: their units, the part that is trained, their
forward pass, the state they decode with, and their scorer.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.errors import ConfigError
from bytelm.inference import DecodingState, PatchedState, Strategy, TransformerState
from bytelm.model.blt import BLT
from bytelm.model.transformer import Transformer
from bytelm.patching import Patcher, Patches, Scorer, build_patches, row_positions
from bytelm.scoring import TransformerScorer
from bytelm.tokens import Tokenizer
from bytelm.units import ByteUnits, PatchUnits, TokenUnits, Units


class CausalLM(nn.Module):
    """A language model: ids in, logits of the next id out."""

    units: Units
    """How text becomes the ids that it reads."""
    tokenizer: Tokenizer | None = None
    """Of a model of tokens."""
    can_predict: bool = True
    """Whether it has logits, or entropies only."""

    @property
    def trained(self) -> nn.Module:
        """The part that learns."""
        raise NotImplementedError

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules whose weights a checkpoint holds, by the name of their file."""
        return {"model": self.trained}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.trained.state_dict().values())).device

    def forward(
        self,
        ids: Int[Tensor, "batch ids"],
        documents: Int[Tensor, "batch ids"] | None = None,
    ) -> Float[Tensor, "batch ids vocab"]:
        """Return the logits, in fp32, of the id after each.

        Args:
            ids: packed rows.
            documents: document of each id; ``None`` for one document a row.
        """
        raise NotImplementedError

    def new_state(self, num_slots: int = 1, strategy: Strategy = "auto") -> DecodingState:
        """Return the state of ``num_slots`` empty documents, to decode with.

        Args:
            num_slots: documents at once.
            strategy: how single ids are run.
        """
        raise NotImplementedError

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return what yields entropies of bytes: the model's scorer, or itself as one.

        Args:
            reset_at_newline: whether a newline begins a new context for a model that is a scorer
                itself; one that has a scorer has decided.

        Raises:
            ConfigError: there is none.
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

    def new_state(self, num_slots: int = 1, strategy: Strategy = "auto") -> TransformerState:
        """Return the state of ``num_slots`` empty documents, to decode with."""
        return TransformerState(self.transformer, num_slots, strategy)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return the transformer as a scorer."""
        return TransformerScorer(self.transformer, reset_at_newline=reset_at_newline)


class TokenLM(ByteLM):
    """A plain transformer over byte-pair tokens: the baseline with a tokenizer."""

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer) -> None:
        super().__init__(transformer)
        self.tokenizer = tokenizer
        self.units = TokenUnits(tokenizer)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("token models have no byte entropies; load a byte model or a BLT")


class Segmentation(NamedTuple):
    """Entropies, where the rule needs them, and the patches they make."""

    entropies: Float[Tensor, "batch bytes"] | None
    patches: Patches


class PatchedLM(CausalLM):
    """A BLT that finds its own patches.

    A rule that is a module becomes part of the BLT, with which it is trained and saved. If it looks
    at the encoder's states, patches are found in the forward pass, and rows carry none.
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
        self.units = ByteUnits() if patcher.needs_states else PatchUnits(patcher)

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
            documents: document of each byte; ``None`` for one document a row.
            states: the encoder's, for a rule that looks at them.
        """
        entropies = None
        if self.patcher.needs_entropies:
            assert self.scorer is not None
            with torch.no_grad():
                entropies = self.scorer.entropies(ids, documents)
        next_boundary = self.patcher.next_boundary(ids, entropies, documents, states)
        return Segmentation(entropies, build_patches(next_boundary, documents))

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
            documents: document of each id; ``None`` for one document a row.
            next_boundary: whether the byte after each starts a patch; ``None`` to find out.
            num_patches: patches to make room for in a row; ``None`` to count them.
        """
        if next_boundary is not None:
            return self.blt(ids, build_patches(next_boundary, documents, num_patches))
        if not self.patcher.needs_states:
            return self.blt(ids, self.segment(ids, documents).patches)
        if documents is None:
            documents = torch.zeros_like(ids)
        states, context = self.blt.encode(ids, documents, row_positions(documents))
        patches = self.segment(ids, documents, states[-1]).patches
        return self.blt.predict(states, patches, context)

    def new_state(self, num_slots: int = 1, strategy: Strategy = "auto") -> PatchedState:
        """Return the state of ``num_slots`` empty documents, to decode with."""
        return PatchedState(self.blt, self.patcher, self.scorer, num_slots, strategy)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return the scorer.

        Raises:
            ConfigError: there is none, since the rule needs none.
        """
        if self.scorer is None:
            raise ConfigError(
                "this model has no scorer: its patching rule needs none, and entropy rules cannot "
                "be applied with it"
            )
        return self.scorer


class ScorerLM(CausalLM):
    """A scorer by itself, which has entropies and no logits."""

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

    def new_state(self, num_slots: int = 1, strategy: Strategy = "auto") -> DecodingState:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(CANNOT_PREDICT)

    def get_scorer(self, *, reset_at_newline: bool = False) -> Scorer:
        """Return the scorer."""
        scorer: Any = self.scorer
        scorer.reset_at_newline = reset_at_newline
        return scorer


CANNOT_PREDICT = "an n-gram scorer holds entropies only: it can patch text, not predict it"
