"""Errors a user can cause and mend.

Every message names the bad value and the remedy; the command line prints it without a traceback.
A bug of ours is an ``AssertionError`` or whatever Python raises, with its traceback.

::

    BytelmError
    +-- ConfigError        a recipe, an override or an option
    +-- DataError          input text, prepared shards
    +-- PatchingError      a threshold that cannot be found
    +-- CheckpointError    a saved model or run
    +-- TrainingError      a run that cannot go on
"""


class BytelmError(Exception):
    """Base of every error that names a user's mistake and its remedy."""


class ConfigError(BytelmError):
    """A configuration value, key or name that cannot be used."""


class DataError(BytelmError):
    """Input text or prepared data that is missing, malformed or damaged."""


class PatchingError(BytelmError):
    """A patching request that no threshold can satisfy."""


class CheckpointError(BytelmError):
    """A saved model that is missing, damaged or made by an incompatible version."""


class TrainingError(BytelmError):
    """A training run that cannot continue, such as one whose loss is no longer finite."""
