"""The regularizers' common type, and their sums."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from attrreg import objectives, own, penalty
from attrreg.attach import Attachment
from attrreg.call import Inputs, Select
from attrreg.distributed import Group
from attrreg.engines import DoubleBackward, Engine, FiniteDifference
from attrreg.needs import Need
from attrreg.objectives import Objective
from attrreg.penalty import Penalty
from attrreg.scores import Score
from attrreg.settings import brief, is_real, keep_flag
from attrreg.spec import Spec, source
from attrreg.trace import Trace

Reduction = Literal["mean", "sum", "batchmean"]


class AttributionRegularizer(Spec, ABC):
    """A penalty on where a model looks: a single term, or a weighted sum of terms.

    Regularizers are immutable values: comparable, and, where functions in them are plain functions, picklable and with a `repr` that
    rebuilds them. `+`, `*`, `sum([...])`, `named`, `reduced` and `using` make one flat sum of them, whose terms share forwards and
    backwards.

    A new kind of term subclasses `SingleRegularizer` with `needs` and `per_image`, or `MapRegularizer` if it has an attribution map.
    """

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The weighted terms of the sum; one for a single regularizer."""

    @property
    def engine(self) -> Engine:
        """How the penalty's parameter gradient is obtained."""
        return DoubleBackward()

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        mask: Tensor,
        target: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        generator: torch.Generator | None = None,
        output: Select = None,
        inputs: Inputs = None,
        fraction: float = 1.0,
        group: Group = None,
    ) -> Tensor:
        """Compute the penalty, to be added to the loss.

        Args:
            model: any module that maps `x` to logits. It is left as it was, its buffers, modes and `.grad` included.
            x: images `(N, C, H, W)`, floating point; may be the result of differentiable operations.
            mask: `(N, H, W)`, `(N, 1, H, W)` or `(H, W)`, boolean or in [0, 1], of any size: 1 = relevant. No gradient flows into it.
            target: classes `(N,)`, or what the score takes. The default score goes by it: see `scores.ByTarget`.
            annotated: boolean `(N,)`: the images that have a mask. None: all.
            generator: where the terms' own random draws come from; None: PyTorch's default generator on the CPU.
            output: where the logits are in what the model returns, if that is not a tensor: an index, key, attribute or function.
            inputs: all that the model is called with, if that is more than `x`: a tuple of arguments or a mapping of keywords,
                with `x` itself among them. The others stay as they are in every pass.
            fraction: the share of the annotated images to compute the penalty on, drawn anew each call; in expectation the penalty
                of all. It then runs a forward of its own, attached or not. Not with `inputs=`.
            group: the ranks that means run over: a process group; None: those of the model's DDP or `fully_shard`; False: this process.

        Returns:
            A 0-dim tensor: the weighted sum over terms of each term's mean over the annotated images. Exactly 0, with a
            graph, when no image is annotated.

        Raises:
            TypeError, ValueError: an argument is not as above; raised before any pass where that can be known.
            RuntimeError: the penalty could not train anything (gradients disabled, all parameters frozen, no path from a
                term to a trainable parameter); it is called under `torch.compile`; or several processes run, and how they train the
                model cannot be seen or handled (docs/distributed.md).

        Cost:
            One forward and one backward for each distinct point and score, and the double backward that the loss's own backward then
            contains; the clean forward is free when an attachment recorded it. Unattached, images without annotation are left out of the
            passes, where that changes nothing: see docs/paying_less.md.
        """
        call = penalty.check(self.terms, model, x, mask, target, annotated, generator, output, inputs, group, fraction)
        return penalty.compute(self.terms, call, self.engine, as_users_forward=False).total

    def evaluate(
        self,
        model: nn.Module,
        x: Tensor,
        mask: Tensor,
        target: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        generator: torch.Generator | None = None,
        output: Select = None,
        inputs: Inputs = None,
        group: Group = None,
    ) -> Penalty:
        """Compute the penalty, its terms and the model's output, in place of the loop's own forward.

        As calling the regularizer, but the clean forward stands in for `model(x)`: it moves BatchNorm's statistics and the random number
        generators exactly as that would, and its output is returned. Where the attached loop's own forward on this `x` was recorded, that
        forward is taken instead, and nothing moves again.

        Args:
            model, x, mask, target, annotated, generator, output, inputs, group: as in calling the regularizer; no `fraction`.

        Returns:
            `Penalty(total, terms, output)`; `output` is what the model returned, before `output=` picks the logits.

        Raises:
            As calling the regularizer.

        Cost:
            As calling the regularizer; the clean forward takes the place of the loop's own, so that none is added.
        """
        call = penalty.check(self.terms, model, x, mask, target, annotated, generator, output, inputs, group)
        return penalty.compute(self.terms, call, self.engine, as_users_forward=True)

    def attach(self, model: nn.Module) -> Attachment:
        """Record the loop's own forwards through hooks, so that a penalty on the same `x` needs no forward of its own.

        Args:
            model: the module that the loop calls.

        Returns:
            A handle: a context manager with `.remove()`.

        Raises:
            TypeError: the model is not an `nn.Module`, or it is TorchScript.
            ValueError: the model does not have a layer, or the engine cannot differentiate a term.
            RuntimeError: the model already has an attachment, or this is called under `torch.compile`.
        """
        return penalty.attach(self.terms, model, self.engine)

    def attribute(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        output: Select = None,
        inputs: Inputs = None,
    ) -> Tensor:
        """Compute the attribution map itself, as Captum defines it: with a target, the default score is here the target's logit.

        Works also under `no_grad` and on a frozen model.

        Args:
            model, x, target, generator, output, inputs: as in calling the regularizer.
            mask: needed only by baselines made from it.

        Returns:
            The map, detached: `(N, C, H, W)` for input attributions, `(N, 1, h, w)` for Grad-CAM, `(N, c, h, w)` for other layer maps.

        Raises:
            TypeError: the regularizer is a sum, or has no map.
            TypeError, ValueError, RuntimeError: as calling the regularizer, but gradients may be disabled and parameters frozen.

        Cost:
            The passes of a call, not differentiated again.
        """
        if isinstance(self, MapRegularizer):
            return penalty.attribute(self, model, x, target, mask, generator, output, inputs)
        if len(self.terms) != 1:
            raise TypeError(f"attribute: a sum of {len(self.terms)} terms has no single map. Call `.attribute` on one term.")
        regularizer = self.terms[0].regularizer
        if regularizer is self:
            raise TypeError(f"{self!r} has no attribution map. Call `.attribute` on a single term that has one.")
        return regularizer.attribute(model, x, target, mask=mask, generator=generator, output=output, inputs=inputs)

    def named(self, name: str) -> Sum:
        """The same term under another name, which is its key in `Penalty.terms`.

        Raises:
            ValueError: this is a sum of several terms, or `name` is not a non-empty string.
        """
        if len(self.terms) != 1:
            raise ValueError(f"named({name!r}): a sum of {len(self.terms)} terms has no single name. Name each term before adding.")
        if not isinstance(name, str) or not name:
            raise ValueError(f"named: a name must be a non-empty string, got {name!r}. Write for example .named('background').")
        return Sum((replace(self.terms[0], name=name),), self.engine)

    def reduced(self, reduction: Reduction) -> Sum:
        """The same terms, reduced over the batch in another way.

        Args:
            reduction: "mean" over the annotated images (the default of every term); "sum" over them, as some papers do,
                whose weight then depends on the batch size; "batchmean": the sum over the size of the whole batch.

        Raises:
            ValueError: `reduction` is none of these.
        """
        return Sum(tuple(replace(term, reduction=reduction) for term in self.terms), self.engine)

    def using(self, engine: Engine) -> Sum:
        """The same terms, with another engine: see `attrreg.engines`.

        Raises:
            TypeError: `engine` is not one of the library's two.
        """
        if not isinstance(engine, (DoubleBackward, FiniteDifference)):
            raise TypeError(
                f"using: an engine is engines.DoubleBackward() or engines.FiniteDifference(), got {engine!r}. Pass one of them."
            )
        return Sum(self.terms, engine)

    def __mul__(self, weight: float) -> Sum:
        if not is_real(weight):
            remedy = "Write for example 0.5 * reg, or weight.item() * reg; a schedule takes Scheduled(reg, schedule)."
            raise TypeError(f"weight must be a number, got {type(weight).__name__}. {remedy}")
        return Sum(tuple(replace(term, weight=term.weight * float(weight)) for term in self.terms), self.engine)

    __rmul__ = __mul__

    def __add__(self, other: object) -> Sum:
        if isinstance(other, AttributionRegularizer):
            if self.engine != other.engine:
                found = f"{self.engine!r} and {other.engine!r}"
                raise ValueError(f"Terms of one sum share passes, and so an engine; these have {found}. Call .using on the sum instead.")
            return Sum(self.terms + other.terms, self.engine)
        if isinstance(other, int) and other == 0:  # where sum([...]) starts
            return Sum(self.terms, self.engine)
        return NotImplemented

    __radd__ = __add__


class SingleRegularizer(AttributionRegularizer):
    """One kind of penalty: what it needs, and its value from that."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """This regularizer with weight 1, under the name of its class."""
        return (Term(self, type(self).__name__),)

    @abstractmethod
    def needs(self) -> tuple[Need, ...]:
        """What the trace must provide."""

    @abstractmethod
    def per_image(self, trace: Trace) -> Tensor:
        """The penalty of each image, `(N,)`."""

    @property
    def needs_region(self) -> str | None:
        """Who is undefined for a mask without any relevant pixel; None: nobody."""
        return None


class MapRegularizer(SingleRegularizer):
    """An attribution map, judged by an objective. Subclasses are frozen dataclasses with the fields below.

    Attributes:
        score: what is differentiated.
        objective: the penalty of the map under the mask, `(map, mask) -> (N,)`: see `attrreg.objectives`.
    """

    score: Score
    objective: Objective

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.score, Score):
            remedy = "Write for example scores.TargetLogit(); an objective goes by name: objective=."
            if isinstance(self.score, nn.Module):
                remedy = f"A model comes with the call, {name}()(model, x, mask); a loss takes scores.TaskLoss(loss)."
            raise TypeError(f"{name}: score must be a scores.Score, got {brief(self.score)}. {remedy}")
        if isinstance(self.objective, type) or not callable(self.objective):
            raise TypeError(
                f"{name}: objective must be a function (map, mask) -> (N,), got {brief(self.objective)}. Write objectives.Energy(), say."
            )
        for field in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if field.type in (bool, "bool"):
                keep_flag(self, field.name)

    @abstractmethod
    def attribution(self, trace: Trace) -> Tensor:
        """The map `(N, C, h, w)`, differentiable."""

    def per_image(self, trace: Trace) -> Tensor:
        """The objective of the map, under the mask at the map's size."""
        return own.penalties(self.objective, own.map_of(self, trace), trace.annotation)

    @property
    def needs_region(self) -> str | None:
        """The objective, if it is undefined for an empty mask."""
        return source(self.objective) if objectives.requires_region(self.objective) else None


@dataclass(frozen=True)
class Term:
    """One term of a sum."""

    regularizer: SingleRegularizer
    name: str
    weight: float = 1.0
    reduction: Reduction = "mean"


@dataclass(frozen=True, repr=False)
class Sum(AttributionRegularizer):
    """A flat weighted sum of terms, as `+` and `*` make it.

    Raises:
        ValueError: there are no terms, two have the same name, a weight is negative or not finite, or a reduction is unknown.
    """

    terms: tuple[Term, ...] = ()  # without a default, the dataclass would take the base's property for it
    engine: Engine = DoubleBackward()

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("Sum: there are no terms. Add at least one.")
        seen: set[str] = set()
        for term in self.terms:
            if not (math.isfinite(term.weight) and term.weight >= 0):
                raise ValueError(
                    f"weight of {term.name} must be finite and at least 0, got {term.weight}. Choose another; a negative one would be a "
                    "reward."
                )
            if term.reduction not in (known := get_args(Reduction)):
                raise ValueError(f"unknown reduction {term.reduction!r} of {term.name}. Use one of {', '.join(map(repr, known))}.")
            if term.name in seen:
                raise ValueError(f"Two terms are called {term.name!r}. Tell them apart with .named('...').")
            seen.add(term.name)

    def __repr__(self) -> str:
        text = " + ".join(_written(term) for term in self.terms)
        return text if self.engine == DoubleBackward() else f"({text}).using({self.engine!r})"


def _written(term: Term) -> str:
    text = f"{term.weight} * {term.regularizer!r}"
    named = "" if term.name == type(term.regularizer).__name__ else f".named({source(term.name)})"
    reduced = "" if term.reduction == "mean" else f".reduced({source(term.reduction)})"
    return f"({text}){named}{reduced}" if named or reduced else text
