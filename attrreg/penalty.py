"""The one way a penalty is computed from the terms of a sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attrreg.call import Call
from attrreg.needs import Need
from attrreg.state import undone_on_error
from attrreg.trace import Trace

if TYPE_CHECKING:
    from attrreg.regularizer import Term


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


def compute(terms: Sequence[Term], call: Call, as_users_forward: bool) -> Penalty:
    """Compute the penalty of a sum of terms for checked arguments."""
    assert call.annotation is not None  # _checked requires a mask
    with undone_on_error(call.x.device, call.generator):
        trace = Trace(call, needs_of(terms), differentiable=True)
        trace.run(as_users_forward)
        parts: dict[str, Tensor] = {}
        for term in terms:
            per_image = term.regularizer.per_image(trace)
            if per_image.shape != (call.x.shape[0],):
                raise ValueError(
                    f"{term.name}: the penalty is {tuple(per_image.shape)}, but must be ({call.x.shape[0]},), one an image. Reduce the map "
                    "over channels and pixels only."
                )
            _check_trainable(term.name, per_image, trace)
            parts[term.name] = term.weight * call.annotation.mean(per_image, term.reduction)
        trace.commit()
    total = torch.stack([part.to(next(iter(parts.values())).dtype) for part in parts.values()]).sum()
    return Penalty(total, {name: part.detach() for name, part in parts.items()}, trace.output if as_users_forward else None)


def _check_trainable(name: str, per_image: Tensor, trace: Trace) -> None:
    """Never a silent no-op: some parameter, or whatever made x, must lie behind the penalty."""
    own = {id(leaf) for leaf in trace.leaves}
    pending, seen = [per_image.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            return
        pending.extend(parent for parent, _ in node.next_functions)
    raise RuntimeError(
        f"{name}: the penalty has no path to any trainable parameter, so it could train nothing. Unfreeze parameters that it "
        "depends on, or choose another layer or score."
    )
