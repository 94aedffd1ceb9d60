"""The language model evaluation harness (``lm_eval``) with models of this package.

``python -m bytelm.evaluation.harness`` is the harness's own command, with the model type
``bytelm``::

    python -m bytelm.evaluation.harness --model bytelm --model_args checkpoint=FOLDER --tasks NAME

In Python, importing this module registers the type. Needs the extra ``harness``.
"""

from bytelm.errors import ConfigError

try:
    from bytelm.evaluation.harness.adapter import BYTES_PER_TOKEN, HarnessLM
except ImportError as error:
    raise ConfigError(
        f"tasks need the package {error.name}: pip install 'bytelm[harness]'"
    ) from None
from bytelm.evaluation.harness.local import FOLDER, TASKS

__all__ = ["BYTES_PER_TOKEN", "FOLDER", "TASKS", "HarnessLM"]
