from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from tests.ranks import Ranks

# numpy's and torchvision's own imports warn on some versions; only what runs in a test is held to "no warnings".
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr  # noqa: F401
    import timm  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where tensors and models are made, for example cuda; without the tests of the CPU's own"
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device != "cpu":  # also for what test modules make when they are imported
        torch.set_default_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of a number's 23


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") != "cpu":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="about the CPU"))


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    """Two processes that train together."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    """Four of them."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture
def half_by_default() -> Iterator[None]:
    """The default type as Lightning's "bf16-true" has it within each step."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Same draws whatever runs before; one thread, so that sums round alike."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
