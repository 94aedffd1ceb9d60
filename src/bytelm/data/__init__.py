"""Data: text to prepared shards, shards to packed rows."""

from bytelm.data.calibration import calibrate_sample, mean_patch_size, sample_dataset
from bytelm.data.corpus import Document, Input, Reader, ReadOptions, find_inputs
from bytelm.data.dataset import Dataset, Manifest, read_manifest
from bytelm.data.loader import Loader, LoaderState
from bytelm.data.packing import IGNORED, Batch, Row, Stretch, make_batch
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
    "calibrate_sample",
    "find_inputs",
    "make_batch",
    "mean_patch_size",
    "prepare",
    "read_manifest",
    "sample_dataset",
]
