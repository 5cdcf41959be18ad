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


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Same draws whatever runs before; one thread, so that sums round alike."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
