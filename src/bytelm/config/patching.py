"""Configuration of patching rules."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bytelm.config.kinds import Kinds, Node
from bytelm.config.model import Positive


class PatchingConfig(Node):
    """Base of what describes a patching rule."""

    needs_calibration: ClassVar[bool] = False
    """Whether a threshold is still to be found."""

    kind: str
    max_length: Positive | None = None
    """Longest patch; null for no limit."""

    @property
    def planned_size(self) -> float | None:
        """Mean bytes per patch that the rule is meant to make; ``None`` if the text decides it."""
        return None


RULES: Kinds[PatchingConfig] = Kinds("patching rule")


@RULES.add
class BytePatching(PatchingConfig):
    """Every byte is a patch."""

    kind: Literal["byte"] = "byte"

    @property
    def planned_size(self) -> float:
        """One byte."""
        return 1.0


@RULES.add
class StaticPatching(PatchingConfig):
    """Patches of a fixed length."""

    kind: Literal["static"] = "static"
    length: Positive

    @property
    def planned_size(self) -> float:
        """The length."""
        return float(self.length)


@RULES.add
class SpacePatching(PatchingConfig):
    """Patches end after space-like bytes."""

    kind: Literal["space"] = "space"


class CalibratedPatching(PatchingConfig):
    """Base of rules with a threshold, given or found for a wanted mean patch size."""

    threshold_name: ClassVar[str] = "threshold"
    """The field that calibration sets."""
    compares_rises: ClassVar[bool] = False
    """Whether it is compared with rises of the entropy instead of entropies."""

    patch_size: Annotated[float, Field(gt=1)] | None = None
    """Wanted mean bytes per patch; used where the threshold is null."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the threshold is still to be found."""
        return getattr(self, self.threshold_name) is None

    @property
    def planned_size(self) -> float | None:
        """The wanted size."""
        return self.patch_size

    def with_threshold(self, value: float) -> "CalibratedPatching":
        """Return the rule with its threshold set."""
        return self.model_copy(update={self.threshold_name: value})


@RULES.add
class EntropyPatching(CalibratedPatching):
    """Global rule: a patch starts where the entropy exceeds a threshold."""

    kind: Literal["entropy"] = "entropy"
    threshold: float | None = None
    """In nats."""


@RULES.add
class MonotonicPatching(CalibratedPatching):
    """Approximate monotonic rule: a patch starts where the entropy rises by an increase."""

    threshold_name: ClassVar[str] = "increase"
    compares_rises: ClassVar[bool] = True

    kind: Literal["monotonic"] = "monotonic"
    increase: float | None = None
    """In nats."""


@RULES.add
class CombinedPatching(CalibratedPatching):
    """Both rules at once; calibration moves the threshold."""

    kind: Literal["combined"] = "combined"
    threshold: float | None = None
    """In nats."""
    increase: float
    """In nats."""
