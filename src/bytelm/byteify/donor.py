"""Donors: token models of the Llama family, as `transformers` loads them.

A donor is a folder, a GGUF file or a Hub repository. What cannot be transplanted is refused before
any weights are read: other families, unknown activations, scalings of positions, quantised weights.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bytelm.config import RopeScaling, StackConfig
from bytelm.errors import CheckpointError
from bytelm.storage import at_home

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Types of `transformers` models whose blocks are those of bytelm."""
EXTRA = "pip install 'bytelm[byteify]'"


class DonorSource(NamedTuple):
    """Where `transformers` finds a donor."""

    name: str
    """Folder or Hub repository."""
    gguf: str | None
    """File in the folder, if the donor is in the format GGUF."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the `from_pretrained` methods."""
        known = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {**known, "trust_remote_code": False}

    def __str__(self) -> str:
        return self.name if self.gguf is None else str(Path(self.name) / self.gguf)


class Donor(NamedTuple):
    """A loaded donor."""

    name: str
    model: Any
    """The `transformers` model, in fp32 and evaluation mode."""
    tokenizer: Any
    """Its fast tokenizer, of the package `tokenizers`."""
    stack: StackConfig
    """Configuration of its blocks as ours, whose RoPE layout is ``interleaved``."""
    window: int | None
    """Tokens that its attention sees, if it has a window; the transplanted blocks see all."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def find_source(donor: str | PathLike[str]) -> DonorSource:
    """Return where a donor is: a folder, a GGUF file, or a Hub repository OWNER/NAME.

    Raises:
        CheckpointError: there is none; or a folder holds several GGUF files.
    """
    path = at_home(donor)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{donor} is a file, but not a GGUF file: name its folder")
        return DonorSource(str(path.parent), path.name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return DonorSource(str(path), None)
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) == 1:
            return DonorSource(str(path), found[0])
        problem = f"{len(found)} GGUF files: name one" if found else "neither config.json nor GGUF"
        raise CheckpointError(f"{donor} is no donor: the folder holds {problem}")
    if str(donor).count("/") != 1 or str(donor).startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no donor at {donor}: name a folder, a GGUF file, or a Hub repository "
            "(OWNER/NAME)"
        )
    return DonorSource(str(donor), None)


def open_donor(donor: str | PathLike[str]) -> Donor:
    """Load a donor in fp32 on the CPU.

    Raises:
        CheckpointError: there is none; it is of another family or has options that blocks of
            bytelm lack; its tokenizer is missing; its weights are quantised or cannot be read; or a
            package is missing.
    """
    source = find_source(donor)
    library = _library(source)
    with _quiet(library):
        config = _loaded(library.AutoConfig, source, "its configuration cannot be read")
        _check_options(config, str(source))
        tokenizer = _load_tokenizer(library, source)
        safe = {} if source.gguf else {"use_safetensors": True}
        model = _loaded(
            library.AutoModelForCausalLM,
            source,
            "its weights cannot be read",
            dtype=torch.float32,
            **safe,
        )
    model.eval().requires_grad_(False)
    return Donor(str(source), model, tokenizer, _stack(model), _window(config))


def _library(source: DonorSource) -> Any:
    try:
        library = import_module("transformers")
        if source.gguf is not None:
            # With these, transformers reads GGUF.
            import_module("accelerate")
            import_module("gguf")
    except ImportError as error:
        raise CheckpointError(f"reading a donor needs the package {error.name}: {EXTRA}") from None
    return library


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Silence the messages and progress bars of `transformers`."""
    logging = library.utils.logging
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The progress bar of dequantisation cannot be switched off.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _loaded(kind: Any, source: DonorSource, problem: str, **options: Any) -> Any:
    """Return what a class of `transformers` loads; its errors have many types."""
    try:
        return kind.from_pretrained(source.name, **source.options, **options)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{source} is no donor: {problem} ({reason})") from None


def _load_tokenizer(library: Any, source: DonorSource) -> Any:
    remedy = "its tokenizer is missing or cannot be read: put its tokenizer.json into the folder"
    found = _loaded(library.AutoTokenizer, source, remedy)
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None or not backend.get_vocab_size(with_added_tokens=False):
        raise CheckpointError(f"{source} is no donor: {remedy}")
    return backend


def _check_options(config: Any, name: str) -> None:
    """Check that blocks of bytelm have all options of a donor's configuration."""
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"{name} is a {config.model_type} model, whose layers differ from bytelm's: donors are "
            f"models of the types {', '.join(FAMILIES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{name} has quantised weights: use the repository with the original ones, or a GGUF "
            "file"
        )
    rope = config.rope_parameters
    refusals = {
        f"hidden_act {config.hidden_act} (only silu)": config.hidden_act not in ("silu", "swish"),
        f"rope_type {rope['rope_type']} (only default, linear, llama3)": (
            rope["rope_type"] not in ("default", "linear", "llama3")
        ),
        "partial rotary positions": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if wrong := [what for what, is_wrong in refusals.items() if is_wrong]:
        raise CheckpointError(
            f"{name} has options that bytelm's blocks lack: {'; '.join(wrong)}; choose another "
            "donor"
        )


def _window(config: Any) -> int | None:
    is_on = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if is_on else None


def _stack(model: Any) -> StackConfig:
    """Return the configuration of a donor's blocks, whose biases only the model itself tells."""
    config, layer = model.config, model.model.layers[0]
    attention = layer.self_attn
    heads = config.num_attention_heads
    return StackConfig(
        dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_scaling=_scaling(config.rope_parameters),
        qk_norm=hasattr(attention, "q_norm"),
        qkv_bias=attention.q_proj.bias is not None,
        out_bias=attention.o_proj.bias is not None,
        ffn_bias=layer.mlp.down_proj.bias is not None,
    )


def _scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    return RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope["original_max_position_embeddings"]),
    )
