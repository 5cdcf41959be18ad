"""Train a timm model on a folder of images with masks, check where it looks, and draw that.

It reads data/{train,valid}/images/CLASS/NAME.jpg and data/{train,valid}/masks/CLASS/NAME.png; some masks may be missing.
"""

from collections import defaultdict
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import attrreg
from attrreg.data import MaskedImageFolder, MaskFolder

DATA, EPOCHS, DEVICE = Path("data"), 8, "cuda" if torch.cuda.is_available() else "cpu"


def loader(split, *augment):
    finish = v2.Resize((64, 64)), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)
    data = MaskedImageFolder(DATA / split / "images", MaskFolder(DATA / split / "masks"), v2.Compose([*augment, *finish]))
    return DataLoader(data, batch_size=16, shuffle=split == "train")


@torch.no_grad()
def check(model):  # accuracy, share of the input gradient inside the mask, and the last batch's gradients
    model.eval()
    right, inside = [], []
    for x, mask, y, annotated in (tuple(item.to(DEVICE) for item in batch) for batch in valid):
        phi = attrreg.InputGradient().attribute(model, x, target=y)
        inside.append(attrreg.metrics.share_inside(phi[annotated], mask[annotated]))
        right.append(model(x).argmax(dim=1) == y)
    return torch.cat(right).float().mean().item(), torch.cat(inside).nanmean().item(), phi


torch.manual_seed(0)
train, valid = loader("train", v2.RandomHorizontalFlip()), loader("valid")
model = timm.create_model("test_resnet", num_classes=len(train.dataset.classes)).to(DEVICE)  # or any other, pretrained=True
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
reg = attrreg.Scheduled(attrreg.ActivationDifference(), attrreg.schedules.Linear(len(train)))  # weight 1, warmed up for an epoch
penalties, shares = defaultdict(dict), {}
accuracy, shares[0], before = check(model)
for epoch in range(EPOCHS):
    model.train()
    for x, mask, y, annotated in (tuple(item.to(DEVICE) for item in batch) for batch in train):
        penalty = reg.evaluate(model, x, mask, target=y, annotated=annotated)  # runs the model; .output are its logits
        optimizer.zero_grad()
        (F.cross_entropy(penalty.output, y) + penalty.total).backward()
        optimizer.step()
        for name, value in penalty.terms.items():
            penalties[name][reg.step] = value.item()
    accuracy, shares[reg.step], after = check(model)
    print(f"epoch {epoch}: accuracy {accuracy:.2f}, {shares[reg.step]:.0%} of the attribution inside the mask")
x, mask, _, annotated = list(valid)[-1]  # the batch of `before` and `after`
attrreg.plot.attributions(x[:4], mask[:4], {"before": before[:4], "after": after[:4]}, annotated=annotated[:4]).savefig("attributions.png")
attrreg.plot.training(penalties, {"valid": shares}, area=mask[annotated].float().mean().item()).savefig("training.png")
