"""Attachment: record the forwards of the user's own loop."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.utils.hooks import RemovableHandle

from attrreg import automatic
from attrreg.call import Call
from attrreg.conditions import Called, image_state, keep_buffers, tensors_in
from attrreg.hooks import Tap
from attrreg.ops.process import transformed
from attrreg.recording import Question, Recording, Request
from attrreg.sites import SPATIAL
from attrreg.state import detach_buffers
from attrreg.walk import modules
from attrreg.wrappers import compiled, compiling, undistributed, unwrap

OTHER_IMAGES = (
    "The penalty got another tensor of images than the model did. It is computed for the one that it got, by a forward of its own. If both "
    "should be the same, pass the very tensor that the model was called with: normalised, moved and laid out as it was there. If you mean "
    "other images, ignore this."
)


SEEN = 64  # how many images of the last forwards are remembered, to tell that a penalty gets others


class Attachment:
    """Handle of `reg.attach(model)`: records the loop's own forwards until it is removed.

    A context manager; `remove()` does the same as leaving it. Nothing is recorded while gradients are disabled, nor where the loop runs the
    model in a checkpoint or in `save_on_cpu`. It warns once where a penalty gets other images than the forward did.

    Args:
        entry: the model, in its wrappers.
        sites: what to record of each forward; True where a gradient will be taken.
        due: asked before each forward; False: a schedule skips this step, so the output alone is recorded.
        twice: gradients will be differentiated again.
        alone: penalties run no pass beside the recorded one, so nobody will ask whether the forward moved buffers.

    Raises:
        RuntimeError: the model already has an attachment.
        TypeError: it is TorchScript.
    """

    def __init__(
        self, entry: nn.Module, sites: Mapping[str, bool], due: Callable[[], bool] = lambda: True, twice: bool = True, alone: bool = False
    ) -> None:
        model = unwrap(entry)
        if attached(model) is not None:
            raise RuntimeError(
                "attach: this model already has an attachment. Remove it first (`handle.remove()`, or leave its `with` block; without the "
                "handle, `attrreg.attach.attached(model).remove()`), and attach the sum of the regularizers."
            )
        self._model = model
        self._sites = dict(sites)
        self._due = due
        self._twice = twice
        self._alone = alone
        self._tap: Tap | None = None
        self._recording: Recording | None = None
        self._kind: Hashable = None  # of the last forward
        self._question: Question | None = None  # whose layer alone it recorded for `layer="auto"`; None: all that may be it
        self._warned = False  # of other images
        self._seen: deque[weakref.ref[Tensor]] = deque(maxlen=SEEN)
        self.suspended = False
        self._watches: list[RemovableHandle] = []  # hooks on what the model returned, for as long as the recording is kept
        self._hooks: list[RemovableHandle] = []
        if compiled(entry):
            warnings.warn(
                "The model is compiled, and PyTorch cannot differentiate a compiled graph twice (pytorch#91469). Its forwards are left as "
                "they are, and each penalty runs its own: uncompiled, unless its engine is FiniteDifference.",
                stacklevel=4,  # the user's line: above it are a method `attach`, penalty.attach and this
            )
            return
        automatic.forget(model)
        self._hooks = [
            model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take all hooks away and drop what was recorded; safe to call twice."""
        while self._hooks:
            self._hooks.pop().remove()
        self._drop_all()

    def __repr__(self) -> str:
        return f"<Attachment to {type(self._model).__name__}{'' if self._hooks else ', recording nothing'}>"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # A copy of the model (an average of its weights, say) carries the hooks along; there they do nothing.
        return _inert, ()

    def take(self, call: Call, request: Request) -> Recording | None:
        """The recorded pass, if it is the one a call needs; None: the call must run its own.

        It is given out once: its graph may be freed after.
        """
        recording, sites = self._recording, request.sites
        takes_gradient = any(sites.values()) or SPATIAL in sites
        if recording is None or (takes_gradient and self._hooked(recording)):
            return None
        copied = isinstance(call.entry, DataParallel)  # for its device
        if not (request.returns_output or self._warned or call.fraction < 1 or copied) and self._has_not_seen(call.x, recording):
            self._warned = True
            warnings.warn(OTHER_IMAGES, stacklevel=6)  # the user's line: above it are __call__, compute, run, _clean_pass and this
        if SPATIAL in sites and self._question not in (None, request.question):
            return None  # the one recorded layer answers another question
        if not recording.serves(call, request):
            return None
        self._drop_recording()
        return recording

    def _has_not_seen(self, x: Tensor, recording: Recording) -> bool:
        """Whether images look like those of a forward, and no forward got them."""
        if x.shape != recording.x.shape or recording.x.requires_grad:  # the copy that another attachment makes has a graph
            return False
        return not any(images() is x for images in self._seen)

    def _hooked(self, recording: Recording) -> bool:
        """Whether the loop has put hooks on the output, or keeps its gradient: for its loss, but an inner backward would run them too."""
        last = max((watch.id for watch in self._watches), default=0)  # those before it are the model's own, as FSDP's
        return any(part.retains_grad or any(id > last for id in part._backward_hooks or ()) for part in tensors_in(recording.output))

    @property
    def map(self) -> str | None:
        """The layer that `layer="auto"` turned out to be for forwards like the last; None: that is not known, or there were several."""
        known = automatic.sole_question(self._model, self._kind)
        return None if known is None else known[1]

    @property
    def live(self) -> bool:
        """False once removed, and on a copy."""
        return bool(self._hooks)

    def _drop_recording(self) -> None:
        self._recording = None
        while self._watches:
            self._watches.pop().remove()

    def _drop_all(self) -> None:
        self._drop_recording()
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Any, dict[str, Any]] | None:
        """A forward pre-hook: open a tap, if this is a forward of the loop's that can be recorded; gives the arguments to go on with.

        It comes without keywords where another thread has just taken the hook's mark away: see `_leave`.
        """
        if compiling():
            return None
        if not self.live:
            self._leave(model)
            return None
        if self.suspended or transformed() or torch._C._is_tracing() or _in_backward():
            return None  # what runs under torch.func, forward-mode derivatives, a tracer or a backward is not the loop's forward
        if model is not self._model:  # nor is that of a replica on another device, which has these hooks too, in a thread of its own
            return None
        self._drop_all()  # the last step's graph, and what an interrupted forward left
        arguments: dict[int | str, Any] = dict(enumerate(args)) | kwargs
        images = {
            key: value for key, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 4
        }
        self._seen.extend(weakref.ref(image) for image in images.values())
        hooks, own = model._forward_hooks, self._hooks[1].id  # `own`: the hook that calls `_after`
        if not images or not torch.is_grad_enabled() or _runs_again() or own not in hooks:  # the last: all hooks were cleared
            return None
        place, x = next(iter(images.items()))
        sites = self._sites if self._due() else {}  # a step that a schedule skips: the output alone, for `Scheduled.evaluate`
        self._kind = automatic.kind(x, model)
        self._question, map = automatic.sole_question(model, self._kind) or (None, None)
        called = Called(args, kwargs, image_state(x), None if self._alone else keep_buffers(model))
        hooks[own] = hooks.pop(own)  # moved to the end: hooks that came later may change what the model returns
        self._tap = Tap(model, sites, map=map, twice=self._twice, called=called)
        arguments[place] = self._tap.open(x)
        return tuple(arguments[i] for i in range(len(args))), {name: arguments[name] for name in kwargs}

    def _leave(self, model: nn.Module) -> None:
        """Take the hooks off a copy of the model, where they do nothing, at its first forward: TorchScript would not compile them."""
        before = model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs
        for registry, marks in (before, (model._forward_hooks, model._forward_hooks_always_called)):
            for key, hook in list(registry.items()):
                if getattr(hook, "__self__", None) is self:
                    registry.pop(key, None)  # which another thread that runs the copy may have done
                    marks.pop(key, None)

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        """A forward hook, called also where the forward raised: close the tap, and keep what it recorded."""
        if self.suspended or self._tap is None or _in_backward() or model is not self._model:
            return
        tap, self._tap = self._tap, None
        tap.close()
        detach_buffers(model)  # also where the forward raised
        if output is None:  # it raised
            return
        self._recording = tap.recording(output)
        owner = weakref.ref(self)  # weak, because the recording holds the output, and with it this hook

        def forget(gradient: Tensor) -> None:
            if (attachment := owner()) is not None:
                attachment._recording = None

        # A backward that reaches the output frees the graph: from then on a call must run its own forward.
        self._watches = [part.register_hook(forget) for part in tensors_in(output) if part.requires_grad]


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a model, found among its hooks: the library keeps no list of its own."""
    for hook in undistributed(model)._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Attachment) and owner.live:
            return owner
    return None


def _in_backward() -> bool:
    """Whether a backward runs, in which a checkpointed block runs again."""
    return torch._C._current_graph_task_id() != -1


def _runs_again() -> bool:
    """Whether hooks on saved tensors are in force, as in a checkpointed block: the backward runs that again, by PyTorch's operators."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _inert() -> Attachment:
    handle = Attachment(nn.Module(), {})
    handle.remove()
    return handle


@contextmanager
def suspended(model: nn.Module, as_users_forward: bool = False) -> Iterator[None]:
    """Run passes of our own, which an attachment to the model, or to a part of it, must not take for the loop's forwards.

    A pass that stands in for the loop's forward (`as_users_forward`) also drops what was recorded, as that forward would.
    """
    found = [attachment for module in modules(model) if (attachment := attached(module)) is not None and not attachment.suspended]
    try:
        for attachment in found:
            attachment.suspended = True
            if as_users_forward:
                attachment._drop_all()
        yield
    finally:
        for attachment in found:
            attachment.suspended = False
