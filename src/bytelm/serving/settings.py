"""Settings of a server."""

from dataclasses import dataclass

from bytelm.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str = "bytelm"
    """Name of the model, as ``/v1/models`` lists it."""
    num_slots: int = 16
    """Largest number of requests that are decoded at once."""
    max_document_bytes: int = 8192
    """Longest document: prompt and continuation together."""
    speculate: bool = False
    """Whether the decoder drafts bytes of a request that is alone."""
    api_keys: tuple[str, ...] = ()
    """Keys that are accepted; if there is none, everybody is."""
    rate_limit: float | None = None
    """Requests per minute of each key, or of each address without one; ``None`` for no limit."""
    max_body: int = 1 << 20
    """Largest body of a request, in bytes."""
    max_open: int = 256
    """Largest number of continuations that are in progress or waiting."""
    timeout: float = 600.0
    """Longest time that a request may take, in seconds."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server from a browser; ``*`` for all."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_document_bytes", "rate_limit", "max_body", "max_open"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if not self.timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, not {self.timeout}")
        if not self.name.isprintable() or not self.name:
            raise ConfigError(f"a model needs a printable name, not {self.name!r}")
        if not all(self.api_keys):
            raise ConfigError("an API key must not be empty: set one, or leave the option out")
