"""The one way a penalty is computed from the terms of a sum, and a map from one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attrreg import call as calls
from attrreg import distributed, masks, own, sites
from attrreg.attach import Attachment
from attrreg.call import Call, Inputs, Select
from attrreg.conditions import tensors_in
from attrreg.distributed import Group
from attrreg.engines import DoubleBackward, Engine
from attrreg.graph import trainable_leaves
from attrreg.needs import Grad, Need, check_engine, check_layers, check_needs, only_clean, sites_at
from attrreg.part import check_fraction, part_of
from attrreg.points import CLEAN
from attrreg.state import full_precision, undone_on_error
from attrreg.trace import Trace
from attrreg.walk import attributes
from attrreg.wrappers import unwrap

if TYPE_CHECKING:
    from attrreg.regularizer import MapRegularizer, Term


class Penalty(NamedTuple):
    """What `evaluate` returns.

    Attributes:
        total: the penalty, 0-dim, to be added to the loss.
        terms: each term's part of the total (its weight included), detached, by name.
        output: what the model returned for `x`.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    output: Any


def needs_of(terms: Sequence[Term]) -> list[Need]:
    """What all terms together ask of a trace."""
    return [need for term in terms for need in term.regularizer.needs()]


def attach(terms: Sequence[Term], model: nn.Module, engine: Engine, due: Callable[[], bool] = lambda: True) -> Attachment:
    """Attach a sum of terms to a model; its forwards are recorded where `due`.

    Raises:
        TypeError, ValueError, RuntimeError: see `AttributionRegularizer.attach`.
    """
    calls.check_model(model)
    for term in terms:
        check_layers(term.regularizer.needs(), unwrap(model), term.name)
    needs = needs_of(terms)
    check_engine(needs, engine)
    return Attachment(model, sites_at(CLEAN, needs), due, engine.twice, alone=engine.twice and only_clean(needs))


def check(
    terms: Sequence[Term],
    model: nn.Module,
    x: Tensor,
    mask: Tensor,
    target: Tensor | None,
    annotated: Tensor | None,
    generator: torch.Generator | None,
    output: Select,
    inputs: Inputs,
    group: Group,
    fraction: float = 1.0,
) -> Call:
    """Check the arguments of a call, before any pass.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument or the term.
    """
    calls.check_images(model, x)
    calls.check_differentiable(model, x, output, inputs)
    calls.check_options(x, generator, output, inputs)
    needs_region = next((who for term in terms if (who := term.regularizer.needs_region)), None)
    annotation = masks.check(mask, x, annotated, needs_region)
    groups = distributed.ranks_of(model, group)
    call = Call(model, x, annotation, calls.check_target(target, x), generator, output, inputs, groups=groups, fraction=fraction)
    check_fraction(call)
    for term in terms:
        check_needs(term.regularizer.needs(), call, term.name)
    _check_one_map(terms, call)
    if any(isinstance(need, Grad) for need in needs_of(terms)):
        distributed.check_coupling(call.whole)
    return call


def compute(terms: Sequence[Term], call: Call, engine: Engine, as_users_forward: bool) -> Penalty:
    """Compute the penalty of a sum of terms for checked arguments."""
    needs = needs_of(terms)
    check_engine(needs, engine)
    if engine.twice and any(isinstance(need, Grad) for need in needs):
        distributed.check_whole(call.whole)
    with undone_on_error(call.x.device, call.generator):
        images = call.x  # the whole batch; where a part is taken, its graph leads back here
        assert call.annotation is not None  # check requires a mask
        call = replace(call, annotation=distributed.everywhere(call.annotation, call.groups))
        call = call if as_users_forward else part_of(call, needs)
        trace = Trace(call, needs, differentiable=True, engine=engine)
        trace.run(as_users_forward)
        parts: dict[str, Tensor] = {}
        for term in terms:
            with full_precision(call.x.device):
                per_image = term.regularizer.per_image(trace)
            trace.check_unwritten(term.name)
            if per_image.shape != (call.x.shape[0],):
                raise ValueError(
                    f"{term.name}: the penalty is {tuple(per_image.shape)}, but must be ({call.x.shape[0]},), one an image. Reduce the map "
                    "over channels and pixels only."
                )
            _check_trainable(term.name, per_image, replace(call, x=images), engine)
            parts[term.name] = term.weight * trace.annotation.mean(masks.at_least_float32(per_image), term.reduction)
        total = trace.differentiated(torch.stack([*parts.values()]).sum(), images)
        distributed.prepare_backward(call.entry, total, held=any(_reads_inside(need, engine.twice) for need in needs))
        trace.commit()
    return Penalty(total, {name: part.detach() for name, part in parts.items()}, trace.output if as_users_forward else None)


def attribute(
    regularizer: MapRegularizer,
    model: nn.Module,
    x: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    generator: torch.Generator | None,
    output: Select,
    inputs: Inputs,
) -> Tensor:
    """Check the arguments of a call for the map of one term, and compute it.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument or the term.
    """
    calls.check_images(model, x)
    calls.check_options(x, generator, output, inputs)
    with torch.inference_mode(False), torch.enable_grad(), undone_on_error(x.device, generator):
        x, mask, target, inputs = calls.out_of_inference(x, mask, target, inputs)
        annotation = None if mask is None else masks.check(mask, x, None)
        call = Call(model, x, annotation, calls.check_target(target, x), generator, output, inputs, shown=True)
        needs = regularizer.needs()
        check_needs(needs, call, type(regularizer).__name__)
        trace = Trace(call, needs, differentiable=False, engine=DoubleBackward())
        trace.run()
        with full_precision(x.device):
            map = own.map_of(regularizer, trace).detach()
        trace.check_unwritten(type(regularizer).__name__)
        return map


def _check_one_map(terms: Sequence[Term], call: Call) -> None:
    """Check that `layer="auto"`, the last layer that a score depends on, is one layer for all terms."""
    terms_by_site: dict[str, str] = {}  # what the scores read that decide the layer, each with a term's name
    for term in terms:
        needs = [need for need in term.regularizer.needs() if need.site == sites.SPATIAL]
        if needs:
            read = {need.score.resolve(call.target).site for need in needs if isinstance(need, Grad)}
            # A term that reads the layer's value and no gradient takes the last layer that the logits depend on.
            terms_by_site |= dict.fromkeys(read or {sites.OUTPUT}, term.name)
    if len(terms_by_site) > 1:
        raise ValueError(
            f"layer='auto' is one layer for all terms of a sum, but the scores of {' and '.join(terms_by_site.values())} read "
            f"{' and '.join(map(repr, terms_by_site))}, and may depend on different layers. Name the layer of each."
        )


def _reads_inside(need: Need, twice: bool) -> bool:
    """Whether the penalty is differentiated from within the model: through a gradient, or from a layer that a pass was left at."""
    left_at = need.score.site if isinstance(need, Grad) else need.site
    return (twice and isinstance(need, Grad)) or left_at not in (sites.INPUT, sites.OUTPUT)


def _check_trainable(name: str, per_image: Tensor, call: Call, engine: Engine) -> None:
    """Check that the penalty depends on a trainable parameter, the model's or one that made x, so that it is never a silent no-op."""
    others = []
    for leaf in trainable_leaves(per_image):
        if isinstance(leaf, nn.Parameter):
            return
        others += [leaf] if leaf is not call.x else []
    # A hook may make features of images a leaf, as Hugging Face's `enable_input_require_grads` does: nobody trains these.
    unknown = [leaf for leaf in others if leaf.dim() > 2 and leaf.shape[:1] == per_image.shape]  # tokens, or a map
    if len(unknown) < len(others) or (unknown and not engine.twice):  # gradients that are leaves themselves are checked when they are moved
        return
    given = [part for part in (call.x, *tensors_in(call.inputs)) if part.requires_grad]
    if not {id(leaf) for leaf in unknown}.isdisjoint(map(id, (*given, *trainable_leaves(*given), *attributes(call.whole)))):
        return
    raise RuntimeError(
        f"{name}: the penalty has no path to any trainable parameter, so it could train nothing. Unfreeze parameters that it "
        "depends on, let gradients through where the forward or an objective detaches, choose another layer or score, or checkpoint "
        "with use_reentrant=False where the model checkpoints."
    )
