"""Bodies of requests and responses, in the shapes of OpenAI's API."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from bytelm import codec

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP = 20
INT64 = 2**63
StopString = Annotated[str, Field(min_length=1)]
_BYTES_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _BYTES_SCHEMA,
        {"type": "array", "items": _BYTES_SCHEMA, "minItems": 1},
    ],
    "description": "Text, or raw bytes as integers from 0 to 255; or a list of either.",
    "default": "",
}


def _as_bytes(text: Any) -> bytes:
    """Return the bytes of a text or of a list of integers."""
    if isinstance(text, str):
        return codec.to_bytes(text)
    # Checked as a whole: one error for each of a million wrong values would fill the memory.
    if not isinstance(text, list) or set(map(type, text)) - {int}:
        raise ValueError("must be text, or a list of integers from 0 to 255")
    try:
        return bytes(text)
    except ValueError:
        raise ValueError("raw bytes must be integers from 0 to 255") from None


def _as_prompts(value: Any) -> list[bytes]:
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        return [_as_bytes(one) for one in value]
    return [_as_bytes(value)]


def _must_be(*allowed: Any) -> AfterValidator:
    """Refuse values that would change the result in a way that is not supported."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise ValueError("not supported: leave it out")
        return value

    return AfterValidator(check)


class Body(BaseModel):
    """Body of a request."""

    # `protected_namespaces`: `model` is OpenAI's name.
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class StreamOptions(Body):
    """Options of streams."""

    include_usage: bool | None = None
    """End with a chunk that has the usage."""
    include_obfuscation: bool | None = None
    """Accepted and ignored."""


class CompletionRequest(Body):
    """Body of ``POST /v1/completions``; lengths are in bytes."""

    model: str | None = None
    prompt: Annotated[
        Any,
        AfterValidator(_as_prompts),
        WithJsonSchema(_PROMPT_SCHEMA),
        Field(validate_default=True),
    ] = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    trace: bool | None = None
    """Report the byte, its entropy and whether it begins a patch, for every byte."""

    user: str | None = None
    """Accepted and ignored."""
    best_of: int | None = None
    suffix: Annotated[str | None, _must_be("")] = None
    logit_bias: Annotated[dict[str, float] | None, _must_be({})] = None
    presence_penalty: Annotated[float | None, _must_be(0)] = None
    frequency_penalty: Annotated[float | None, _must_be(0)] = None

    @model_validator(mode="after")
    def _check_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("best_of must equal n: choices are not ranked")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream=true")
        return self

    @property
    def stops(self) -> list[bytes]:
        """Byte strings that end a continuation."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [codec.to_bytes(stop) for stop in stops]

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return 1 if self.n is None else self.n


class PatchesRequest(Body):
    """Body of ``POST /v1/patches``."""

    model: str | None = None
    text: Annotated[
        Any,
        AfterValidator(_as_bytes),
        WithJsonSchema({"anyOf": [{"type": "string"}, _BYTES_SCHEMA]}),
    ]
    rule: str | None = None
    threshold: float | None = None
    increase: float | None = None
    length: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None


class Logprobs(BaseModel):
    """Log-probabilities of the bytes of a text, in nats."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    bytes: list[int]


class TracedByte(BaseModel):
    """A generated byte, and what the patching rule saw before it."""

    byte: int
    entropy: float | None
    begins_patch: bool | None


class CompletionChoice(BaseModel):
    """One continuation of one prompt."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None
    trace: list[TracedByte] | None = None


class Usage(BaseModel):
    """Numbers of bytes."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """Response of ``POST /v1/completions``, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_document_bytes: int
    context_bytes: int
    patching: dict[str, Any] | None
    """The model's own rule."""
    patching_rules: list[str]
    """Rules that ``/v1/patches`` can apply."""
    has_patches: bool
    """Whether the model has global steps, one for each patch."""


class ModelList(BaseModel):
    """Response of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class Patch(BaseModel):
    """A patch: bytes ``begin`` to ``end`` of the text."""

    begin: int
    end: int
    text: str


class PatchesResponse(BaseModel):
    """Response of ``POST /v1/patches``."""

    object: Literal["patches"]
    model: str
    rule: dict[str, Any]
    threshold: float | None
    bytes: list[int]
    entropies: list[float] | None
    patches: list[Patch]
    patch_size: float
    global_steps: int | None
    flops_per_byte: float | None


class ErrorBody(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Response to every request that fails."""

    error: ErrorBody
