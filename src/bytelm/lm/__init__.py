"""Language models of bytes, patches and tokens, behind one protocol."""

from bytelm.lm.building import Parts, build_lm, register_model
from bytelm.lm.kinds import ByteLM, CausalLM, PatchedLM, ScorerLM, Segmentation, TokenLM

__all__ = [
    "ByteLM",
    "CausalLM",
    "Parts",
    "PatchedLM",
    "ScorerLM",
    "Segmentation",
    "TokenLM",
    "build_lm",
    "register_model",
]
