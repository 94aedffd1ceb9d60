"""Errors that users can cause and fix.

Every message names the bad value and the remedy; the command line prints it without a traceback.
Bugs raise ``AssertionError`` or other built-in exceptions, and keep their traceback.

::

    BytelmError
    +-- ConfigError        a recipe, an override or an option
    +-- DataError          input text, prepared shards
    +-- PatchingError      a threshold that cannot be found
    +-- CheckpointError    a saved model or run
    +-- TrainingError      a run that cannot continue
    +-- NumericalError     NaN or infinity among a model's numbers
"""


class BytelmError(Exception):
    """Base class of all errors whose message names a mistake and its remedy."""


class ConfigError(BytelmError):
    """Invalid configuration value, key or name."""


class DataError(BytelmError):
    """Missing, malformed or damaged input text or prepared data."""


class PatchingError(BytelmError):
    """Patching request that no threshold can satisfy."""


class CheckpointError(BytelmError):
    """Saved model that is missing, damaged or of an incompatible version."""


class TrainingError(BytelmError):
    """Training run that cannot continue, for example because its loss is not finite."""


class NumericalError(BytelmError):
    """NaN or infinity among the logits, entropies or likelihoods of a model."""
