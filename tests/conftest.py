import os

import hypothesis
import jaxtyping
import pytest
import torch

import shape_checks
from commands import invoke

hypothesis.settings.register_profile(
    "default", deadline=None, max_examples=16, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("default")
# What --jaxtyping-packages decorates the functions of the package with.
jaxtyping.jaxtyped = shape_checks.checked


def pytest_configure(config):
    # Workers of Ray would give way to the other tests, and those who wait for them would wait long.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Each xdist worker on a small machine gets one thread; otherwise they fight over the cores.
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _whole_samples():
    """Room in rows is measured on a few of them: on all, that takes longer than a small run."""
    from bytelm.training import rows

    whole = {"SAMPLE_ROWS": rows.SAMPLE_ROWS, "FIRST_ROWS": rows.FIRST_ROWS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "SAMPLE_ROWS", 32)
        patch.setattr(rows, "FIRST_ROWS", 8)
        yield whole


@pytest.fixture(scope="module")
def whole_samples(_whole_samples):
    """Room in rows is measured as in use."""
    from bytelm.training import rows

    with pytest.MonkeyPatch.context() as patch:
        for name, value in _whole_samples.items():
            patch.setattr(rows, name, value)
        yield


@pytest.fixture
def run(capsys):
    """Run a command; returns its exit status, output and error output."""

    def run(*arguments, stdin=b""):
        status = invoke(*arguments, stdin=stdin)
        return status, *capsys.readouterr()

    return run
