"""Adversarial invariance: features from which nobody can tell whether the irrelevant part was replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from attrreg import penalty
from attrreg.attach import Attachment
from attrreg.baselines import Baseline, Masked, Shuffle, as_baseline
from attrreg.call import Inputs, Select
from attrreg.distributed import Group
from attrreg.needs import Need, Value
from attrreg.penalty import Penalty
from attrreg.points import At
from attrreg.regularizer import SingleRegularizer, Sum
from attrreg.settings import brief, check_count, fits_64_bits, is_integer, is_number
from attrreg.sites import check_by_image, check_layer_name, feature_site
from attrreg.trace import Trace


class AdversarialInvariance:
    """The loss of fooling a discriminator between features of the image and of the image without its irrelevant part.

    Per image: weight * [softplus(D(h(x))) + softplus(-D(h(x~)))] / 2, with D the logit that it is a whole image,
    x~ = m x + (1 - m) fill(x), and D held constant: cross-entropy with the labels flipped. D is trained by this object alone,
    with the right labels, before the penalty is computed.

    Used like a regularizer: `loss += invariance(model, x, mask)`. It is safe in any loop: D and its optimizer are no part of your model,
    D's own gradients end at the features, your loss's gradients end at D, and neither `.grad` nor the random number generators are
    touched by its training. A batch on which D's loss or its gradients are not finite does not train it, as a `GradScaler` skips a step.
    It counts its calls, so it is an object with a state and not a term of a sum: add the values. Where the loop runs on several devices,
    each process trains a D of its own.

    Args:
        weight: of the penalty; finite and at least 0.
        layer: dotted name of the layer with the features, or "auto": those that enter the classifier.
        fill: what takes the place of the irrelevant pixels; None: `Shuffle()`.
        every: D is trained at each `every`-th call, from the first on; at least 1.
        rate: learning rate of D's Adam; positive.
        hidden: widths of D's hidden layers, each at least 1.
        seed: of D's first weights; an integer of 64 bits.

    Attributes:
        step: how many calls there were.

    Raises:
        TypeError, ValueError: naming the argument; in a call, where features have another width than in the first.

    Cost:
        One forward on x~ and first-order gradients through it; the clean forward is free when attached. One forward of D on both kinds of
        features, and where it is trained a second one with its backward.

    Source:
        The adversarial arm of the founding paper, arXiv 1910.00199, after Ganin et al. 2016, arXiv 1505.07818, and with the spectral
        normalisation of Miyato et al. 2018, arXiv 1802.05957. Its code takes the sum of the two cross-entropies, where
        here is their mean, with a weight of 10 for the crosses (20 here); it trains D in each batch, with rate .01, but the model in each
        tenth alone, which here is up to your loop; and D has ReLUs, and no spectral normalisation in its last layer.
    """

    def __init__(
        self,
        weight: float = 1.0,
        layer: str = "auto",
        fill: Baseline | Tensor | float | None = None,
        *,
        every: int = 1,
        rate: float = 1e-3,
        hidden: Sequence[int] = (1024, 1024, 1024),
        seed: int = 0,
    ) -> None:
        check_layer_name(layer)
        fill = as_baseline(Shuffle() if fill is None else fill, "fill")
        if isinstance(hidden, str) or not isinstance(hidden, Sequence):
            raise TypeError(f"hidden must be the widths of the hidden layers, got {brief(hidden)}. Write for example hidden=(1024,).")
        check_count("every", every, 1)
        for width in hidden:
            check_count("hidden", width, 1)
        if not is_number(rate) or rate <= 0:
            raise ValueError(f"rate must be a positive learning rate, got {brief(rate)}. Write for example rate=1e-3.")
        if not is_integer(seed) or not fits_64_bits(seed):
            raise TypeError(f"seed must be an integer of 64 bits, got {brief(seed)}. Write for example seed=0.")
        self._discriminator = _Discriminator(tuple(map(int, hidden)), rate, int(seed))
        confusion = _Confusion(feature_site(layer), fill, int(every), self._discriminator)
        self._sum: Sum = weight * confusion.named("AdversarialInvariance")

    @property
    def step(self) -> int:
        """How many calls there were."""
        return self._discriminator.step

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
        """Train D where that is due, and compute the penalty. See `AttributionRegularizer.__call__`."""
        return self._sum(
            model, x, mask, target, annotated=annotated, generator=generator, output=output, inputs=inputs, fraction=fraction, group=group
        )

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
        """Train D where that is due, and compute the penalty in place of the loop's forward. See `AttributionRegularizer.evaluate`."""
        return self._sum.evaluate(
            model, x, mask, target, annotated=annotated, generator=generator, output=output, inputs=inputs, group=group
        )

    def attach(self, model: nn.Module) -> Attachment:
        """Record the loop's own forwards. See `AttributionRegularizer.attach`."""
        return penalty.attach(self._sum.terms, model, self._sum.engine)

    def discriminate(self, features: Tensor) -> Tensor:
        """D's logits `(N,)` that features `(N, ...)` are those of whole images.

        Raises:
            RuntimeError: there was no call yet, so D does not know how wide features are.
        """
        if self._discriminator.network is None:
            raise RuntimeError("The discriminator takes shape at the first call. Call this object on a batch before.")
        with torch.no_grad():
            return self._discriminator.logits(features)

    def state_dict(self) -> dict[str, Any]:
        """D, its optimizer and the count, for a checkpoint of the training."""
        return self._discriminator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is not what `state_dict` gave.
        """
        names = self.state_dict().keys()
        if not isinstance(state, Mapping) or state.keys() != names or not is_integer(state["step"]) or state["step"] < 0:
            found = f"{', '.join(map(str, state))} with step={state.get('step')!r}" if isinstance(state, Mapping) else brief(state)
            raise ValueError(f"state must have {', '.join(names)}, as state_dict() gives them, got {found}. Pass what was saved of it.")
        try:
            self._discriminator.load_state_dict(state)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, StopIteration) as error:
            hidden = self._discriminator.hidden
            raise ValueError(f"state is of no discriminator with the layers {hidden}: {error}. Load it into one made alike.") from error

    def __repr__(self) -> str:
        term = self._sum.terms[0]
        return f"<AdversarialInvariance of weight {term.weight} after {self.step} steps: {term.regularizer!r}>"


class _Discriminator:
    """A multilayer perceptron with spectral normalisation, and its Adam. Takes shape with the first features."""

    def __init__(self, hidden: tuple[int, ...], rate: float, seed: int) -> None:
        self.hidden = hidden
        self.rate = rate
        self.seed = seed
        self.step = 0
        self.width = 0
        self.network: nn.Sequential | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def build(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the network, without a mark on the random number generators."""
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed accelerators too
            for before, after in zip((width, *self.hidden), (*self.hidden, 1), strict=True):
                layers += [spectral_norm(nn.Linear(before, after, device="cpu")), nn.LeakyReLU(0.1)]
        self.width = width
        # In eval mode, so that a pass is a pass: spectral normalisation moves its estimates only in `train`.
        self.network = nn.Sequential(*layers[:-1]).to(device, dtype).eval()
        self.optimizer = torch.optim.Adam(self.network.parameters(), self.rate)

    def logits(self, features: Tensor) -> Tensor:
        """Of features `(N, ...)`; no gradient reaches the network's parameters."""
        assert self.network is not None
        entered = self._prepared(features)
        constants = {name: value.detach() for name, value in self.network.named_parameters()}
        logits: Tensor = torch.func.functional_call(self.network, constants, (entered,))
        return logits.squeeze(1)

    def train(self, whole: Tensor, without: Tensor) -> None:
        """One step on features of images and of images without their irrelevant part, both `(N, ...)`; where none is possible, nothing."""
        if self.network is None:
            self.build(whole.flatten(1).shape[1], whole.device, whole.dtype)
        assert self.network is not None and self.optimizer is not None
        if not len(whole):
            return
        entered = [self._prepared(features.detach()) for features in (whole, without)]
        parameters = list(self.network.parameters())
        self.network.train()
        try:
            real, fake = (self.network(each).squeeze(1) for each in entered)
        finally:
            self.network.eval()
        loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
        gradients = torch.autograd.grad(loss, parameters)
        if not torch.stack([part.isfinite().all() for part in (loss, *gradients)]).all():  # or its weights would be NaN for ever
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes."""
        network = None if self.network is None else self.network.state_dict()
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {"step": self.step, "width": self.width, "network": network, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a state that does not fit changes nothing."""
        loaded = _Discriminator(self.hidden, self.rate, self.seed)
        loaded.step = int(state["step"])
        if state["network"] is not None:  # a checkpoint may be older than the first call
            first = next(iter(state["network"].values()))
            loaded.build(state["width"], first.device, first.dtype)
            assert loaded.network is not None and loaded.optimizer is not None
            loaded.network.load_state_dict(state["network"])
            loaded.optimizer.load_state_dict(state["optimizer"])
        self.__dict__.update(loaded.__dict__)

    def _prepared(self, features: Tensor) -> Tensor:
        """Features `(N, ...)` as the network takes them, moving it to their device: a checkpoint may have been loaded elsewhere.

        Raises:
            ValueError: they have another width than those of the first call.
        """
        assert self.network is not None and self.optimizer is not None
        features = features.flatten(1)
        if features.shape[1] != self.width:
            raise ValueError(
                f"The features are {features.shape[1]} wide, but were {self.width}. Use one object for each layer and image size."
            )
        weight = next(self.network.parameters())
        if weight.device != features.device:
            self.network.to(features.device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # which moves its moments to their parameters
        return features.to(weight.dtype)

    def __repr__(self) -> str:
        return f"discriminator of {self.width or '?'}-{'-'.join(map(str, self.hidden))}-1, rate {self.rate}, seed {self.seed}"


@dataclass(frozen=True, repr=False)
class _Confusion(SingleRegularizer):
    """The penalty; computing it trains the discriminator."""

    site: str
    fill: Baseline
    every: int
    discriminator: _Discriminator = field(compare=False)

    def __repr__(self) -> str:
        return f"{self.discriminator!r}, trained every {self.every}, at {self.site}, fill {self.fill!r}"

    def needs(self) -> tuple[Need, ...]:
        """The features of both images."""
        return Value(self.site), Value(self.site, At(Masked(self.fill)))

    def per_image(self, trace: Trace) -> Tensor:
        """Cross-entropy with the labels flipped."""
        whole, without = trace.value(self.site), trace.value(self.site, At(Masked(self.fill)))
        check_by_image(whole, trace.call.x, self.site)
        annotated = trace.annotation.annotated
        if self.discriminator.step % self.every == 0:
            self.discriminator.train(whole[annotated], without[annotated])
        confusion = (F.softplus(self.discriminator.logits(whole)) + F.softplus(-self.discriminator.logits(without))) / 2
        self.discriminator.step += 1  # not of a call that raises
        return confusion
