"""The harness's own command; the package has registered the model type ``bytelm``."""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
