"""Images with masks: a data set over folders, and masks that follow mixed images. Needs torchvision, which timm brings."""

from attrreg.data.folder import MaskedImageFolder, Sample, Transforms
from attrreg.data.mix import WithMasks
from attrreg.data.sources import BoxFile, MaskFolder, MaskSource

__all__ = ["BoxFile", "MaskFolder", "MaskSource", "MaskedImageFolder", "Sample", "Transforms", "WithMasks"]
