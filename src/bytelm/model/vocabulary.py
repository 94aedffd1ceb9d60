"""A vocabulary: pieces of text with vectors of their own, read by patches and predicted by latents.

A token model keeps what it knows of its tokens in two tables: embeddings, and the head that
predicts them. A BLT that is made from it can go on using both, without a tokenizer. What a patch
names, and what its latent predicts, are *pieces*: the bytes from the last byte of one patch to the
byte before the last one of the next::

    bytes      t h e _ c a t _ s a t
    patches    --------|-------|-----        a patch ends when it is known that a token has ended:
    pieces           [_ c a t|_ s a t        with the first byte after it

**Reading.** The vector of a patch that ends with byte ``j`` is the embedding of its piece, if that
is in the vocabulary, and the encoder's otherwise.

**Predicting.** A latent gives probabilities ``P`` of pieces. Of those that begin with the bytes
``p`` since the latent, ``M(p)`` is the sum, and ``P(p)`` that of ``p`` itself, after which comes a
byte of the next piece, which only the decoder predicts::

    spelled[b] = M(p b) / (M(p) - P(p))                                the piece goes on
    w          = sigmoid(log P'(p) - log(M(p) - P(p)) + gate)          it has ended
    p[b]       = w decoder[b] + (1 - w) spelled[b]

with ``gate`` an output of the decoder and ``P'(p) = P(p) + 0.001 M(p)``. Where no piece begins with
``p``, ``w`` is 1. With pieces in order of their bytes, those that begin with ``p`` are a range, so
every ``M`` is a difference of two cumulative sums, in fp64. The ranges are the nodes of a trie.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bytelm import codec
from bytelm.config import VocabularyConfig
from bytelm.model.attention import RMSNorm

NOWHERE = -1
"""Node of bytes that no piece begins with."""
LATENTS = 128
"""Latents whose distributions over all pieces are in memory at once."""
_LEAST = 1e-12
"""Smallest probability that a difference of cumulative sums can tell."""
_DOUBT = 1e-3
"""Least share of the decoder where pieces go on, since text may be divided otherwise."""


class Vocabulary(nn.Module):
    """Pieces of text, with vectors to read and to predict them.

    Args:
        config: sizes.
        dim: width of patch vectors and latents.
        eps: of the norm before the head.
    """

    keys: Int[Tensor, " edges"]
    """``256 parent + byte`` of each edge of the trie, in order; edge ``k`` leads to node
    ``k + 1``."""
    branches: Int[Tensor, " bounds"]
    """The first edge of each node, and the number of edges."""
    begins: Int[Tensor, " nodes"]
    """The first piece of each node's range."""
    inner: Int[Tensor, " nodes"]
    """The first piece after the one that the node itself spells, if there is one."""
    ends: Int[Tensor, " nodes"]
    """The first piece after the range."""

    def __init__(self, config: VocabularyConfig, dim: int, eps: float) -> None:
        super().__init__()
        self.widest = config.widest
        self.embedding = nn.Embedding(config.size, dim)
        self.norm = RMSNorm(dim, eps=eps)
        self.head = None if config.tied else nn.Linear(dim, config.size, bias=False)
        nodes = config.nodes
        for name, size in (("keys", nodes - 1), ("branches", nodes + 1), ("begins", nodes)):
            self.register_buffer(name, torch.zeros(size, dtype=torch.long))
        for name in ("inner", "ends"):
            self.register_buffer(name, torch.zeros(nodes, dtype=torch.long))

    @property
    def predicting(self) -> Float[Tensor, "pieces dim"]:
        """Vectors that predict the pieces."""
        return self.embedding.weight if self.head is None else self.head.weight

    def step(
        self, nodes: Int[Tensor, "*shape"], ids: Int[Tensor, "*shape"]
    ) -> Int[Tensor, "*shape"]:
        """Return the nodes after one more byte; ids that are no bytes lead nowhere."""
        values = ids - codec.OFFSET
        wanted = nodes * 256 + values
        found = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        is_there = (self.keys[found] == wanted) & (nodes != NOWHERE) & (values >= 0)
        return torch.where(is_there, found + 1, NOWHERE)

    def walk(
        self,
        ids: Int[Tensor, "batch bytes"],
        next_boundary: Bool[Tensor, "batch bytes"],
        before: Int[Tensor, " batch"] | None = None,
    ) -> Int[Tensor, "batch bytes"]:
        """Return the node after each byte, of the bytes since the last latent.

        Args:
            ids: ids of some documents.
            next_boundary: whether a patch ends with each.
            before: the node before the first; ``None`` if it is BOS.
        """
        is_first = next_boundary | (ids == codec.BOS)
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        begin = torch.where(is_first, index, -1).cummax(1).values
        depth = index - begin
        root = torch.zeros_like(ids)
        initial = root if before is None else before[:, None].expand_as(ids)
        first = torch.where(is_first, self.step(root, ids), self.step(initial, ids))
        first = torch.where(ids == codec.BOS, 0, first)
        # A byte before any boundary is the first of those that follow ``before``.
        depth = torch.where(begin < 0, index, depth)
        nodes = torch.where(depth == 0, first, NOWHERE)
        for at in range(1, ids.shape[1]):
            last = nodes.roll(1, 1)
            is_here = (depth == at) & (last != NOWHERE)
            if not is_here.any():
                break
            nodes = torch.where(is_here, self.step(last, ids), nodes)
        return nodes

    def read(
        self, vectors: Float[Tensor, "*shape dim"], nodes: Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape dim"]:
        """Return patch vectors: of a piece its embedding, otherwise the encoder's.

        Args:
            vectors: the encoder's.
            nodes: where each patch's piece ends: the node before the last byte of the patch.
        """
        place = nodes.clamp(min=0)
        is_piece = (nodes != NOWHERE) & (self.inner[place] > self.begins[place])
        embedded = self.embedding(torch.where(is_piece, self.begins[place], 0))
        return torch.where(is_piece[..., None], embedded, vectors)

    def masses(self, latents: Float[Tensor, "latents dim"]) -> Float[Tensor, "latents bounds"]:
        """Return the cumulative probabilities, in fp64, of the pieces in order."""
        logits = functional.linear(self.norm(latents), self.predicting)
        return functional.pad(logits.softmax(-1).double().cumsum(-1), (1, 0))

    def predict(
        self,
        logits: Float[Tensor, "batch bytes outputs"],
        latents: Float[Tensor, "batch patches dim"],
        decoder_ids: Int[Tensor, "batch bytes"],
        nodes: Int[Tensor, "batch bytes"],
    ) -> Float[Tensor, "batch bytes vocab"]:
        """Return log-probabilities of the id after each byte.

        Args:
            logits: the decoder's, with the gate last.
            latents: the global transformer's.
            decoder_ids: the latent that each byte reads.
            nodes: the node after each byte.
        """
        num_patches = latents.shape[1]
        rows = torch.arange(len(latents), device=latents.device)[:, None] * num_patches
        reads, flat = (decoder_ids + rows).flatten(), latents.flatten(0, 1)
        own, places = logits.flatten(0, 1), nodes.flatten()

        def part(own: Tensor, some: Tensor, reads: Tensor, places: Tensor) -> Tensor:
            return self.mix(own, self.masses(some), reads, places)

        # For gradients, the distributions of all latents over all pieces are too large to keep.
        learns = latents.requires_grad or self.predicting.requires_grad
        run = partial(checkpoint, part, use_reentrant=False) if learns else part
        order = reads.argsort(stable=True)
        sizes = torch.bincount(reads // LATENTS).tolist()
        parts = []
        for at, here in enumerate(order.split(sizes)):
            begin = at * LATENTS
            some = flat[begin : begin + LATENTS]
            parts.append(run(own[here], some, reads[here] - begin, places[here]))
        found = own.new_empty(len(own), codec.VOCAB_SIZE, dtype=torch.float32)
        return found.index_copy(0, order, torch.cat(parts)).unflatten(0, decoder_ids.shape)

    def mix(
        self,
        logits: Float[Tensor, "bytes outputs"],
        masses: Float[Tensor, "latents bounds"],
        reads: Int[Tensor, " bytes"],
        nodes: Int[Tensor, " bytes"],
    ) -> Float[Tensor, "bytes vocab"]:
        """Return log-probabilities of the id after each byte; see :meth:`predict`.

        Args:
            logits: the decoder's.
            masses: from :meth:`masses`.
            reads: the latent that each byte reads.
            nodes: the node after each byte.
        """
        place = nodes.clamp(min=0)
        first, end = self.branches[place], self.branches[place + 1]
        edges = first[:, None] + torch.arange(self.widest, device=nodes.device)
        is_child = (edges < end[:, None]) & (nodes != NOWHERE)[:, None]
        edges = torch.where(is_child, edges, 0)
        rows = reads[:, None]
        sums = masses[rows, self.ends[edges + 1]] - masses[rows, self.begins[edges + 1]]
        sums = torch.where(is_child, sums, 0.0)
        spelled = sums.new_zeros(len(nodes), codec.VOCAB_SIZE)
        spelled = spelled.scatter_add(1, self.keys[edges] % 256 + codec.OFFSET, sums)
        going = sums.sum(-1)
        ended = masses[reads, self.inner[place]] - masses[reads, self.begins[place]]
        ended = ended.clamp(min=0) + _DOUBT * (ended + going).clamp(min=_LEAST)
        odds = ended.log() - going.clamp(min=_LEAST).log()
        is_known = (going > _LEAST) & (nodes != NOWHERE)
        gate = (odds + logits[:, -1]).clamp(-30, 30)
        own = logits[:, :-1].log_softmax(-1)
        goes_on = functional.logsigmoid(-gate) - going.clamp(min=_LEAST).log()
        mixed = torch.logaddexp(
            functional.logsigmoid(gate)[:, None] + own,
            goes_on[:, None] + spelled.clamp(min=_LEAST**2).log(),
        )
        return torch.where(is_known[:, None], mixed, own).float()


Trie = dict[str, Tensor]
"""Buffers of a :class:`Vocabulary`."""


def build_trie(pieces: Sequence[bytes]) -> Trie:
    """Return the trie of some pieces.

    Args:
        pieces: distinct byte strings, in order.
    """
    # Nodes by depth, then in order: the children of a node are neighbours.
    level = [(0, 0, len(pieces))]
    begins, inner, ends, keys, branches = [0], [], [len(pieces)], list[int](), list[int]()
    count, depth = 1, 0
    while level:
        following = []
        for node, begin, end in level:
            branches.append(len(keys))
            at = begin
            while at < end and len(pieces[at]) == depth:
                at += 1
            inner.append(at)
            while at < end:
                byte, first = pieces[at][depth], at
                while at < end and pieces[at][depth] == byte:
                    at += 1
                keys.append(256 * node + byte)
                begins.append(first)
                ends.append(at)
                following.append((count, first, at))
                count += 1
        level, depth = following, depth + 1
    lists = {"keys": keys, "begins": begins, "inner": inner, "ends": ends}
    tensors = {name: torch.tensor(one) for name, one in lists.items()}
    return tensors | {"branches": torch.tensor([*branches, len(keys)])}
