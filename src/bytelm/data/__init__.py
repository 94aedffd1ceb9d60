"""Data: text to prepared shards, shards to packed rows."""

from bytelm.data.calibration import (
    calibrate_sample,
    mean_patch_size,
    mean_token_bytes,
    sample_dataset,
    train_dataset_tokenizer,
)
from bytelm.data.corpus import Document, Input, Reader, ReadOptions, find_inputs
from bytelm.data.dataset import Dataset, Manifest, read_manifest
from bytelm.data.loader import Loader, LoaderState
from bytelm.data.packing import IGNORED, Batch, Row, Stretch, Units, make_batch
from bytelm.data.preparation import PrepareOptions, Progress, prepare

__all__ = [
    "IGNORED",
    "Batch",
    "Dataset",
    "Document",
    "Input",
    "Loader",
    "LoaderState",
    "Manifest",
    "PrepareOptions",
    "Progress",
    "ReadOptions",
    "Reader",
    "Row",
    "Stretch",
    "Units",
    "calibrate_sample",
    "find_inputs",
    "make_batch",
    "mean_patch_size",
    "mean_token_bytes",
    "prepare",
    "read_manifest",
    "sample_dataset",
    "train_dataset_tokenizer",
]
