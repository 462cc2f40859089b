"""Set before anything imports triton: without a CUDA GPU kernels run in its interpreter. And `--record FILE`."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--record`."""
    parser.addoption(
        "--record", metavar="FILE", help="write outcomes, hardware and versions as JSON; {gpu} is its name"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin to record if asked to."""
    if name := config.getoption("--record"):
        from helpers.record import record_to

        record_to(config, name)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the CUDA GPU if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from helpers.interpreter import quicken

    quicken()
    return torch.device("cpu")
