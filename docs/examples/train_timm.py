"""A loop in the style of timm's `train.py`, with masks: its optimizers, schedulers, model average and Mixup.

python train_timm.py DATA --model resnet50 --pretrained     # DATA/images/CLASS/NAME.jpg, DATA/masks/CLASS/NAME.png
"""

import argparse
import logging
from pathlib import Path

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, setup_default_logging
from torch.nn import CrossEntropyLoss
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import v2

import attrreg
from attrreg.data import MaskedImageFolder, MaskFolder, WithMasks

log = logging.getLogger("train")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--warmup-epochs", type=int, default=3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--cutmix", type=float, default=0.0)
    parser.add_argument("--penalty", type=float, default=1.0, help="weight of the regularizer after its warm-up")
    parser.add_argument("--out", type=Path, default=Path("model.pt"))
    return parser.parse_args()


def build_loader(args: argparse.Namespace) -> DataLoader:
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(args.size, scale=(0.4, 1.0)),  # image and mask alike
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.2, 0.2, 0.2),  # the image alone
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD),
        ]
    )
    data = MaskedImageFolder(args.data / "images", MaskFolder(args.data / "masks"), augment)
    collate = default_collate
    if args.mixup or args.cutmix:  # timm's Mixup would leave the masks where they were
        mix = WithMasks(Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, num_classes=len(data.classes)))
        collate = mix.collate
    return DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True, collate_fn=collate)


def main() -> None:
    setup_default_logging()
    args, device = options(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    loader = build_loader(args)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=len(loader.dataset.classes)).to(device)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, sched=args.sched, num_epochs=args.epochs, warmup_epochs=args.warmup_epochs)
    average = ModelEmaV3(model, decay=args.ema_decay)
    task_loss = SoftTargetCrossEntropy() if args.mixup or args.cutmix else CrossEntropyLoss()
    warm_up = attrreg.schedules.Linear(max(1, args.warmup_epochs * len(loader)))
    reg = attrreg.Scheduled(args.penalty * attrreg.InputGradient(), warm_up)
    updates = 0
    for epoch in range(epochs):
        losses, penalties = AverageMeter(), AverageMeter()
        model.train()
        with reg.attach(model):
            for batch in loader:
                x, mask, y, annotated = (item.to(device, non_blocking=True) for item in batch)
                loss = task_loss(model(x), y)
                penalty = reg(model, x, mask, target=y, annotated=annotated)
                optimizer.zero_grad()
                (loss + penalty).backward()
                optimizer.step()
                updates += 1
                average.update(model, step=updates)
                scheduler.step_update(num_updates=updates)
                losses.update(loss.item(), len(x))
                penalties.update(penalty.item(), len(x))
        lr = optimizer.param_groups[0]["lr"]
        scheduler.step(epoch + 1)
        log.info(f"epoch {epoch}: loss {losses.avg:.3f}, penalty {penalties.avg:.4f} of weight {reg.weight:.2f}, lr {lr:.2e}")
    torch.save({"model": average.module.state_dict(), "reg": reg.state_dict()}, args.out)


if __name__ == "__main__":
    main()
