"""Lightning: a callback that adds the penalty to the loss that `training_step` returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from attrreg import penalty as penalties
from attrreg.attach import Attachment
from attrreg.call import Inputs, Select
from attrreg.distributed import Group
from attrreg.penalty import Penalty
from attrreg.regularizer import AttributionRegularizer
from attrreg.schedules import Scheduled
from attrreg.settings import brief

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lightning":
        raise
    raise ImportError("attrreg.integrations.lightning needs lightning. Install with: pip install 'attrreg[integrations]'") from error

Batch = (
    tuple[Tensor, Tensor, Tensor | None]
    | tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    | tuple[Tensor, Tensor, Tensor | None, Tensor | None, Inputs]
)


class _Step:
    """A module's `training_step` with the penalty at its end. An object, so that the module can be copied and saved meanwhile.

    Attributes:
        callback: adds the penalty; None: not any more.
        own: the `training_step` that was set on the instance before, as by another of these callbacks; None: the class's.
    """

    def __init__(self, callback: AttributionPenalty, module: LightningModule, model: nn.Module) -> None:
        self.callback: AttributionPenalty | None = callback
        self.module, self.model, self.own = module, model, vars(module).get("training_step")
        self.original = module.training_step
        self.__wrapped__ = inspect.unwrap(self.original)  # Lightning looks at the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.original(*args, **kwargs)
        # Some modules call `training_step` in their `validation_step`, where there is no penalty.
        if result is None or self.callback is None or not self.module.trainer.training:
            return result
        if isinstance(result, Mapping) and result.get("loss") is None:  # Lightning will say that the loss is missing
            return result
        batch = args[0] if args else kwargs[next(iter(inspect.signature(self.original).parameters))]
        return self.callback.added(self.module, self.model, result, batch)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.original,)  # a copy gets its own plain `training_step`

    def remove(self) -> None:
        """Leave the module as it was: at once, or where another step is around this one, with that one."""
        self.callback = None
        while isinstance(step := vars(self.module).get("training_step"), _Step) and step.callback is None:
            if step.own is None:
                del self.module.training_step
            else:
                self.module.training_step = step.own  # type: ignore[method-assign]


def _itself(step: Any) -> Any:
    return step


class AttributionPenalty(Callback):
    """Add a regularizer to the loss of a `LightningModule`, whose `training_step` stays as it is.

        trainer = Trainer(callbacks=[AttributionPenalty(attrreg.InputGradient(), model="net")])

    During `fit`, what `training_step` returns gets the penalty added, as if the line stood at its end. So precision plugins, gradient
    accumulation and strategies treat it as they treat the loss. The step's own forward is reused where it ran on the very tensor that
    `batch` names as the images; else the penalty runs its own. Each term is logged as `penalty/NAME`, over all ranks. Several submodules
    take a callback each, with terms of different names.

    Args:
        regularizer: a regularizer, or a `Scheduled` one, whose step is saved in checkpoints.
        batch: from the loader's batch to `(x, mask, target)`, `(x, mask, target, annotated)` or `(x, mask, target, annotated, inputs)`; the
            last three may be None. By default the batch is such a tuple, as those of `attrreg.data.MaskedImageFolder` are.
        model: dotted name of the submodule that maps images to logits; "": the `LightningModule` itself, by its `forward`.
        output: where the logits are in what that returns, as in calling the regularizer.
        group: over whose ranks means run, as there, needed where the strategy is neither DDP nor FSDP2; or a function that gives it, since
            there is no group before `fit`: `lambda: torch.distributed.group.WORLD`.

    Raises:
        TypeError: `regularizer` is none; at the first step: `batch` gives something else.
        ValueError: at the start of `fit`: the model has no such submodule, or that has no forward.
        RuntimeError: at the start of `fit`: optimization is manual, or the whole `LightningModule` is compiled.
    """

    def __init__(
        self,
        regularizer: AttributionRegularizer | Scheduled,
        batch: Callable[[Any], Batch] = tuple,
        model: str = "",
        output: Select = None,
        group: Group | Callable[[], Group] = None,
    ) -> None:
        if not isinstance(regularizer, (AttributionRegularizer, Scheduled)):
            raise TypeError(f"regularizer must be a regularizer, got {brief(regularizer)}. Write attrreg.InputGradient(), for example.")
        self.regularizer, self.batch, self.model, self.output, self.group = regularizer, batch, model, output, group
        self._attachment: Attachment | None = None
        self._step: _Step | None = None

    @property
    def state_key(self) -> str:
        """The key of its state in checkpoints: another one for each submodule, since each may have a callback."""
        return self._generate_state_key(model=self.model) if self.model else super().state_key

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and put the penalty at the end of `training_step`."""
        model = self._checked(pl_module)
        self._attachment = self.regularizer.attach(model)
        self._step = _Step(self, pl_module, model)
        pl_module.training_step = self._step  # type: ignore[method-assign]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The schedule's step, if there is one."""
        return dict(self.regularizer.state_dict()) if isinstance(self.regularizer, Scheduled) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if isinstance(self.regularizer, Scheduled) and state_dict:
            self.regularizer.load_state_dict(state_dict)

    def _remove(self) -> None:
        for held in (self._attachment, self._step):
            if held is not None:
                held.remove()
        self._attachment = self._step = None

    def _checked(self, pl_module: LightningModule) -> nn.Module:
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "AttributionPenalty adds to the loss that training_step returns, but here optimization is manual. Add the penalty in "
                "training_step: loss = loss + reg(model, x, mask)."
            )
        if pl_module._compiler_ctx is not None:
            raise RuntimeError(
                "The whole LightningModule is compiled, and PyTorch cannot differentiate a compiled graph twice. Compile the network "
                "inside it instead, for example self.net = torch.compile(net)."
            )
        try:
            found = pl_module.get_submodule(self.model)
        except AttributeError:
            known = ", ".join(repr(name) for name, _ in pl_module.named_children())
            raise ValueError(
                f"model: {type(pl_module).__name__} has no submodule {brief(self.model)}. Name one of {known}, or '' for itself."
            ) from None
        if getattr(type(found), "forward", None) in (LightningModule.forward, nn.Module.forward) and "forward" not in vars(found):
            inside = ", ".join(repr(f"{self.model}.{name}".lstrip(".")) for name, _ in found.named_children())
            raise ValueError(f"model: {type(found).__name__} ({self.model!r}) has no forward of its own. Name one of {inside}.")
        return found

    def added(self, pl_module: LightningModule, model: nn.Module, result: Any, batch: Any) -> Any:
        """What `training_step` returned, with the penalty added to the loss."""
        x, mask, target, annotated, inputs = self._mapped(batch)
        found = self._penalty(model, x, mask, target, annotated, inputs)
        logged = {f"penalty/{name}": value for name, value in found.terms.items()}
        pl_module.log_dict(logged, batch_size=x.shape[0], sync_dist=True)  # a rank's own share may be 0; their mean is the penalty
        if isinstance(result, Mapping):
            return {**result, "loss": result["loss"] + found.total}
        return result + found.total

    def _mapped(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Inputs]:
        given = batch if self.batch is tuple else self.batch(batch)
        parts: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (given,)
        fifth = parts[4] if len(parts) == 5 else None
        held = fifth.values() if isinstance(fifth, Mapping) else fifth if isinstance(fifth, tuple) else ()
        # Indices, paths (of which `default_collate` makes a tuple) and other data are no `inputs`, which hold the images themselves.
        other = fifth is not None and not any(value is parts[0] for value in held)
        if other or len(parts) not in (3, 4, 5) or not isinstance(parts[0], Tensor):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(
                f"batch must give (x, mask, target), and may give annotated and inputs (x among them) too, got ({kinds}) of a "
                f"{type(batch).__name__}. Pass a function, as batch=lambda batch: (batch['image'], batch['mask'], batch['label'])."
            )
        annotated, inputs = (*parts[3:], None, None)[:2]
        return parts[0], parts[1], parts[2], annotated, inputs

    def _penalty(
        self, model: nn.Module, x: Tensor, mask: Tensor, target: Tensor | None, annotated: Tensor | None, inputs: Inputs
    ) -> Penalty:
        """The penalty with its terms. Unlike `evaluate`, without a forward in the user's place: that has run already."""
        regularizer = self.regularizer
        if isinstance(regularizer, Scheduled):
            if not regularizer.weight:
                names = [term.name for term in regularizer.regularizer.terms]
                zero = regularizer(model, x, mask, target, annotated=annotated, inputs=inputs)
                return Penalty(zero, dict.fromkeys(names, zero.detach()), None)
            regularizer = regularizer.weight * regularizer.regularizer
        group = self.group() if callable(self.group) else self.group
        call = penalties.check(regularizer.terms, model, x, mask, target, annotated, None, self.output, inputs, group)
        found = penalties.compute(regularizer.terms, call, regularizer.engine, as_users_forward=False)
        if isinstance(self.regularizer, Scheduled):
            self.regularizer.step += 1
        return found
