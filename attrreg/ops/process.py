"""Settings that PyTorch keeps for the whole process, changed for a while. When the last of several threads is done, they are as before."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch.utils.checkpoint
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, _sdpa_kernel

Context = Callable[[], AbstractContextManager[object]]


class _Setting:
    """One that threads may change: how often each uses it now, and what it was before the first did."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self._get, self._put = get, put
        self._lock = threading.Lock()
        self._uses: Counter[int] = Counter()
        self._first: Any = None
        self._changed = False

    @contextmanager
    def __call__(self) -> Iterator[Callable[[Any], None]]:
        """Yields what changes it, until the end."""
        thread, changed = threading.get_ident(), False
        with self._lock:
            before = self._get()
            if not self._uses:
                self._first, self._changed = before, False
            self._uses[thread] += 1

        def put(value: Any) -> None:
            nonlocal changed
            with self._lock:
                changed = self._changed = True
                self._put(value)

        try:
            yield put
        finally:
            with self._lock:
                self._uses[thread] -= 1
                self._uses += Counter()  # drops those at zero
                if not self._uses and self._changed:
                    self._put(self._first)
                elif changed and thread in self._uses:
                    self._put(before)  # else the setting is left for the other threads, which need the same


attention_kernels = _Setting(_cur_sdpa_kernel_backends, _sdpa_kernel)
BY_MATH = [SDPBackend.MATH]


@contextmanager
def attention_by(kernels: list[SDPBackend]) -> Iterator[None]:
    """Have PyTorch choose among these kernels."""
    with attention_kernels() as put:
        put(kernels)
        yield


# PyTorch has no public hook on checkpointed blocks. A function stands in for the class, since making a subclass each time takes longer.
FRAME = torch.utils.checkpoint._CheckpointFrame
_frames = _Setting(lambda: torch.utils.checkpoint._CheckpointFrame, partial(setattr, torch.utils.checkpoint, "_CheckpointFrame"))


class _Thread(threading.local):
    """The contexts inside which checkpointed blocks that this thread starts will be recomputed, the outermost first."""

    def __init__(self) -> None:
        self.inside: list[tuple[Context, Callable[[], None]]] = []


_thread = _Thread()


def _framed(recompute_fn: Callable[..., None], *rest: Any) -> Any:
    """A checkpointed block's frame, as PyTorch makes one at the block's start, whose recomputation runs inside the contexts."""
    for context, start in reversed(_thread.inside):
        start()
        recompute_fn = partial(_recompute, recompute_fn, context, start)
    return FRAME(recompute_fn, *rest)


def _recompute(recompute_fn: Callable[..., None], context: Context, start: Callable[[], None], *args: Any) -> None:
    with context(), checkpoints_recompute_inside(context, start):  # a block may hold another
        recompute_fn(*args)


@contextmanager
def checkpoints_recompute_inside(context: Context, start: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Recompute blocks that are checkpointed (`use_reentrant=False`) meanwhile inside a context, whenever that happens.

    Args:
        context: made anew for each recomputation.
        start: called where a checkpointed block starts.
    """
    with _frames() as put:
        put(_framed)
        inside, entry = _thread.inside, (context, start)
        inside.append(entry)
        try:
            yield
        finally:  # in another thread, where that is the one that cleans up
            inside[:] = [entered for entered in inside if entered is not entry]


def transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work here, which have rules for PyTorch's own functions only."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0
