from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

# numpy's and torchvision's own imports warn on some versions; only what runs in a test is held to "no warnings".
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import captum.attr  # noqa: F401
    import timm  # noqa: F401


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Same draws whatever runs before; one thread, so that sums round alike."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
