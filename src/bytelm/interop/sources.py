"""Find weights in a folder, or download them from the Hugging Face Hub."""

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from bytelm.errors import CheckpointError
from bytelm.storage import at_home

ENTROPY_FOLDER = "entropy_model"
"""Folder of the entropy model in a repository in the official format."""


def find_folder(source: str | PathLike[str]) -> Path:
    """Return a folder with weights, downloading a Hub repository if necessary.

    Args:
        source: a folder, a repository ``OWNER/NAME``, or a folder of it, ``OWNER/NAME/FOLDER``.

    Raises:
        CheckpointError: there is no such folder or repository, or it cannot be downloaded.
    """
    folder = at_home(source)
    if folder.is_dir():
        return folder
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", str(source))
    if folder.exists() or match is None or str(source).startswith("."):
        raise CheckpointError(
            f"{source} is neither a folder nor the name of a Hub repository (OWNER/NAME)"
        )
    repository, inside = match[1], match[2] or ""
    return _download(repository, inside.rstrip("/"))


def wanted_files(names: Sequence[str], inside: str) -> list[str]:
    """Return the files to download of a folder of a repository, and of its entropy model.

    These are configurations and weights; ``.pth`` files only if there are no safetensors.
    """
    wanted = []
    for folder in (inside, f"{inside}/{ENTROPY_FOLDER}".lstrip("/")):
        here = [n for n in names if n.rpartition("/")[0] == folder]
        weights = [n for n in here if n.endswith(".safetensors")]
        weights = weights or [n for n in here if n.endswith(".pth")]
        wanted += [n for n in here if n.endswith(".json")] + weights
    return wanted


def _download(repository: str, inside: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
    except ImportError:
        raise CheckpointError(
            f"there is no folder {repository}, and downloading from the Hub needs another package: "
            "pip install 'bytelm[hub]'"
        ) from None
    try:
        names = wanted_files(huggingface_hub.list_repo_files(repository), inside)
        root = Path(huggingface_hub.snapshot_download(repository, allow_patterns=names))
    except GatedRepoError:
        raise CheckpointError(
            f"{repository} is gated: accept its licence on https://huggingface.co/{repository}, "
            "log in with `hf auth login`, and run the command again"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"there is no folder {repository}, and it could not be downloaded from the Hub: "
            f"{reason}"
        ) from None
    if not (root / inside).is_dir():
        raise CheckpointError(f"the Hub repository {repository} has no folder {inside}")
    return root / inside
