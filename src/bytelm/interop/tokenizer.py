"""Tokenizer files with which ``transformers`` encodes text as the ids of a byte model."""

from typing import Any

from bytelm import codec

SPECIAL = ("<|boe|>", "<|bos|>", "<|eos|>", "<|bpe|>")
"""Names of the special ids, in order."""


def byte_alphabet() -> list[str]:
    """Return the character that represents each byte in byte-level tokenizers.

    Printable bytes of Latin-1 represent themselves; the others are represented by the characters
    from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokenizer_files() -> dict[str, dict[str, Any]]:
    """Return the contents of the tokenizer's JSON files by name; it encodes BOS and the bytes."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = [
        {
            "id": i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, name in enumerate(SPECIAL)
    ]
    vocabulary = {name: i for i, name in enumerate(SPECIAL)}
    vocabulary |= {c: codec.OFFSET + byte for byte, c in enumerate(byte_alphabet())}
    bos = SPECIAL[codec.BOS]
    before = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [before, text],
            "pair": [before, text, pair],
            "special_tokens": {bos: {"id": bos, "ids": [codec.BOS], "tokens": [bos]}},
        },
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": SPECIAL[codec.EOS],
        "pad_token": SPECIAL[codec.BOE],
        "clean_up_tokenization_spaces": False,
        # The name of a special id in a text must be encoded as text.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
