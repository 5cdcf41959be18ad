"""Memory that a step has freed is there for the next one, once it is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import attrreg

STEPS = """
import resource
import torch
import attrreg

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step = [torch.ones(4 * 2**20) for _ in range(4)]
    del step
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(), faults()
print(faults(), attrreg.keep_memory(), faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere it changes nothing")
def test_pages_are_not_given_back() -> None:
    out = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=300).stdout
    before, kept, _, after = out.split()
    assert kept == "True" and int(before) > 1000 and int(after) < int(before) / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere it changes nothing")
def test_there_is_no_size_from_which_on_pages_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        gnu_get_libc_version = None

        def mallopt(self, parameter: int, value: int) -> int:
            set_to[parameter] = value
            return 1

    set_to: dict[int, int] = {}
    monkeypatch.setattr("ctypes.CDLL", lambda name: Library())
    assert attrreg.keep_memory() and set_to == {-1: -1, -4: 0}  # 2**31 - 1 would be two GiB, which a step may exceed


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)  # is not even looked for
    assert attrreg.keep_memory() is False


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # musl's has no mallopt
    assert attrreg.keep_memory() is False
