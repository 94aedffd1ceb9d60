"""Data: text prepared into shards, and shards packed into rows."""

from bytelm.data.calibration import (
    all_documents,
    calibrate_sample,
    sample_dataset,
    train_dataset_tokenizer,
)
from bytelm.data.corpus import Reader
from bytelm.data.dataset import Dataset, InputRecord, Manifest, read_manifest
from bytelm.data.finding import find_inputs
from bytelm.data.inputs import Input, ReadOptions
from bytelm.data.loader import OPEN_SPANS, Loader, LoaderState, SpanOrder
from bytelm.data.packing import Batch, Row, make_batch
from bytelm.data.preparation import PreparationState, PrepareOptions, prepare
from bytelm.data.records import Document
from bytelm.units import IGNORED

__all__ = [
    "IGNORED",
    "OPEN_SPANS",
    "Batch",
    "Dataset",
    "Document",
    "Input",
    "InputRecord",
    "Loader",
    "LoaderState",
    "Manifest",
    "PreparationState",
    "PrepareOptions",
    "ReadOptions",
    "Reader",
    "Row",
    "SpanOrder",
    "all_documents",
    "calibrate_sample",
    "find_inputs",
    "make_batch",
    "prepare",
    "read_manifest",
    "sample_dataset",
    "train_dataset_tokenizer",
]
