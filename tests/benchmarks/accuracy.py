"""Whether imagenet_train.py reaches the accuracy of plain PyTorch with the same recipe.

    python3 tests/benchmarks/accuracy.py --tree=DIR [--classes=10] [--epochs=10] [--seeds=3] [--size=64]

In:  a tree of images, train/<class>/* and val/<class>/*, of which the first --classes are used.
Out: top-1 after the last epoch for each seed, and mean and standard deviation over the seeds, of
  plain    torchvision's ImageFolder and transforms, DataLoader, and a plain training loop
  script   imagenet_train.py on shards that imagenet_shards.py makes of the same images
Both in float32 (the script: unless --precision) with SGD, linear warm-up over one epoch, cosine decay, label smoothing
0.1, no weight decay on norms and biases, random resized crops and flips.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms as T
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

TOP = Path(__file__).parent.parent.parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def subset(tree: Path, classes: int, folder: Path) -> Path:
    """A tree of links to the first classes."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for path in sorted(path for path in (tree / split).iterdir() if path.is_dir())[:classes]:
            (folder / split / path.name).symlink_to(path.resolve())
    return folder


def plain(args: argparse.Namespace, tree: Path, seed: int) -> float:
    """Top-1 after the last epoch, per cent."""
    torch.manual_seed(seed)
    tensor = [T.ToTensor(), T.Normalize(MEAN, STD)]
    train = ImageFolder(tree / "train", T.Compose([T.RandomResizedCrop(args.size), T.RandomHorizontalFlip(), *tensor]))
    val = ImageFolder(tree / "val", T.Compose([T.Resize(args.resize), T.CenterCrop(args.size), *tensor]))
    loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.get_model(args.model, num_classes=len(train.classes))
    model = model.to(device, memory_format=torch.channels_last)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1, momentum=args.momentum)
    peak, warmup, steps = args.lr * args.batch_size / 256, len(loader), args.epochs * len(loader)
    for epoch in range(args.epochs):
        model.train()
        for step, (images, labels) in enumerate(loader, start=epoch * len(loader)):
            decay = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = peak * ((step + 1) / warmup if step < warmup else decay)
            logits = model(images.to(device, memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.inference_mode():
        batches = DataLoader(val, args.batch_size, num_workers=args.workers)
        right = sum((model(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in batches)
    return 100 * right / len(val)


def script(args: argparse.Namespace, shards: Path, seed: int, output: Path) -> float:
    """Top-1 after the last epoch, per cent."""
    flags = [
        f"--shards={shards}", f"--output={output}", f"--seed={seed}", f"--max-epochs={args.epochs}",
        f"--model={args.model}", f"--train-size={args.size}", f"--val-size={args.size}", f"--val-resize={args.resize}",
        f"--batch-size={args.batch_size}", f"--lr={args.lr}", f"--momentum={args.momentum}", "--warmup-epochs=1",
        f"--weight-decay={args.weight_decay}", "--label-smoothing=0.1", f"--workers={args.workers}", "--devices=1",
        f"--precision={args.precision}",
    ]
    run = subprocess.run([sys.executable, TOP / "imagenet_train.py", *flags], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    with open(output / "version_0" / "metrics.csv", newline="") as file:
        return [100 * float(row["val_top1"]) for row in csv.DictReader(file) if row["val_top1"]][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--precision", default="32-true", help="of the script; the plain loop's is 32-true")
    for name, default in (("classes", 10), ("epochs", 10), ("seeds", 3), ("seed", 0), ("size", 64), ("resize", 64),
                          ("batch-size", 64), ("workers", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", 0.08), ("momentum", 0.9), ("weight-decay", 5e-4)):
        parser.add_argument(f"--{name}", type=float, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree, shards = subset(args.tree, args.classes, Path(folder, "tree")), Path(folder, "shards")
        make = [sys.executable, TOP / "imagenet_shards.py", f"--imagenet={tree}", f"--shards={shards}"]
        subprocess.run([*make, "--maxcount=500"], check=True, stdout=subprocess.DEVNULL)
        results: dict[str, list[float]] = {"plain": [], "script": []}
        print("| seed | plain, top-1 % | script, top-1 % | minutes |\n|---|---|---|---|")
        for seed in range(args.seed, args.seed + args.seeds):
            begun = time.monotonic()
            results["plain"].append(plain(args, tree, seed))
            results["script"].append(script(args, shards, seed, Path(folder, f"output-{seed}")))
            minutes = (time.monotonic() - begun) / 60
            print(f"| {seed} | {results['plain'][-1]:.2f} | {results['script'][-1]:.2f} | {minutes:.1f} |", flush=True)
    means = {name: statistics.mean(values) for name, values in results.items()}
    spreads = {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in results.items()}
    print(f"| mean ± standard deviation | {means['plain']:.2f} ± {spreads['plain']:.2f} "
          f"| {means['script']:.2f} ± {spreads['script']:.2f} | |")
    print(f"difference of the means: {means['script'] - means['plain']:+.2f} points")


if __name__ == "__main__":
    main()
