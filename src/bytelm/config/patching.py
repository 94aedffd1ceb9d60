"""Configuration of patching rules."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from bytelm.config.kinds import Kinds, Node
from bytelm.config.model import Positive


class PatchingConfig(Node):
    """Base class of the configurations of patching rules."""

    needs_calibration: ClassVar[bool] = False
    """Whether the rule has a threshold that is not set yet."""

    kind: str
    max_length: Positive | None = None
    """Longest patch; null for no limit."""

    @property
    def planned_size(self) -> float | None:
        """Intended mean bytes per patch; ``None`` if it depends on the text."""
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
    """Patches that end after space-like bytes (SpaceByte)."""

    kind: Literal["space"] = "space"


class CalibratedPatching(PatchingConfig):
    """Base class of rules with a threshold, which is given or calibrated for a mean patch size."""

    threshold_name: ClassVar[str] = "threshold"
    """The field that calibration sets."""
    compares_rises: ClassVar[bool] = False
    """Whether the threshold is compared with increases of the entropy, not with entropies."""

    patch_size: Annotated[float, Field(gt=1)] | None = None
    """Wanted mean bytes per patch, for calibration; used if the threshold is null."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the threshold is not set yet."""
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
    """Global rule: a patch starts where the entropy exceeds a threshold (paper section 2.3)."""

    kind: Literal["entropy"] = "entropy"
    threshold: float | None = None
    """In nats."""


@RULES.add
class MonotonicPatching(CalibratedPatching):
    """Approximate monotonic rule: a patch starts where the entropy rises by more than a limit."""

    threshold_name: ClassVar[str] = "increase"
    compares_rises: ClassVar[bool] = True

    kind: Literal["monotonic"] = "monotonic"
    increase: float | None = None
    """In nats."""


@RULES.add
class CombinedPatching(CalibratedPatching):
    """Global and monotonic rule together; calibration sets the threshold."""

    kind: Literal["combined"] = "combined"
    threshold: float | None = None
    """In nats."""
    increase: float
    """In nats."""
