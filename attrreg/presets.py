"""Published regularizers with their constants and reductions, named by paper.

Their weights belong to their training: a sum over the batch beside a sum or a mean of cross-entropies, images in a certain
range. Each docstring says which; change either and the weight means something else.
"""

from __future__ import annotations

from attrreg.attributions import ActivationDifference, InputGradient
from attrreg.baselines import Shuffle
from attrreg.objectives import AbsoluteOutside, SquaredOutside
from attrreg.regularizer import Sum
from attrreg.scores import Contrast, SumLogProb


def rrr_ross2017(weight: float = 1000.0) -> Sum:
    """Right for the right reasons: weight * sum over the batch of sum (o * d sum_k log p_k / dx)^2.

    Args:
        weight: 1000 in the code's Decoy-MNIST and toy-colour experiments, beside a cross-entropy that is *summed* over
            batches of 256 and pixels in 0..255. Beside the usual mean, divide by the batch size; for pixels in [0, 1], by
            255 squared.

    Source:
        Ross, Hughes and Doshi-Velez 2017, arXiv 1703.03717, and its code dtak/rrr. Paper and autograd code agree on sums
        and on no factor of a half, and this is that form. They differ elsewhere: the code's class default is 1e-4; its
        later TensorFlow version has `l2_loss`, so half of this; `normalize=True` divides by the number of masked values.
        There a mask of 1 means irrelevant.
    """
    return weight * InputGradient(SumLogProb(), SquaredOutside()).named("rrr_ross2017").reduced("sum")


def gradmask_viviano2019(weight: float = 0.203439) -> Sum:
    """GradMask, contrast form: weight * sum over the batch of sum |o * d|y_0 - y_1| / dx|. Needs targets.

    Args:
        weight: that of the synthetic (crosses) experiment, beside a mean of cross-entropies over batches of 32, with learning
            rate 0.01. It was searched for each data set, and found between 1e-4 and 6.6.

    Source:
        arXiv 1910.00199, and its code josephdviviano/saliency-red-herring. The code has a second form (positive
        class only) and an earlier one whose weight grows with the epoch; this is the contrast form of its model's
        loss. There it is for two classes; here the contrast is against the best other class. Images without a mask
        count as all relevant there, and so add nothing; here say `annotated=`, with the same result.
    """
    return weight * InputGradient(Contrast(), AbsoluteOutside()).named("gradmask_viviano2019").reduced("sum")


def actdiff_viviano2019(weight: float = 1.0) -> Sum:
    """ActDiff: weight * mean over the batch of ||h(x) - h(x~)||_2, with h the pooled features, x~ shuffled outside the mask.

    Args:
        weight: effectively 1 in the code, which reads a weight from its settings (0.115 for the crosses) and never
            multiplies by it.

    Source:
        arXiv 1910.00199, and its code josephdviviano/saliency-red-herring. The paper writes the weight; this is the
        code's effective value. The mean runs over the whole batch, images without a mask included, as there. Left
        out: 1e-6 added to each difference, and a second update of BatchNorm's statistics by the masked pass.
    """
    return weight * ActivationDifference("auto", Shuffle()).named("actdiff_viviano2019").reduced("batchmean")


def actdiff_gradmask_viviano2019(actdiff: float = 1.0, gradmask: float = 0.203439) -> Sum:
    """ActDiff and GradMask together: the sum of the two presets, whose terms share the clean pass. Needs targets.

    Args:
        actdiff, gradmask: the weights of the two, each found by itself: the sum's own were not published.

    Source:
        The combined arm of the first version of arXiv 1910.00199.
    """
    return actdiff_viviano2019(actdiff) + gradmask_viviano2019(gradmask)
