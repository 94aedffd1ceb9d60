"""Byte-level language models built on the Byte Latent Transformer."""

__version__ = "0.1.0"
