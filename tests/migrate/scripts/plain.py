"""Tell three spirals apart. A flat script, written on a workstation with one NVIDIA card."""

import argparse
import math
from pathlib import Path

import torch
import torch.nn as nn
from torch.cuda.amp import GradScaler, autocast
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--no-amp", action="store_true", help='train in fp32, even on "cuda"')
parser.add_argument("--save", default="spirals.pt", help="where the best weights go")
args = parser.parse_args()

torch.manual_seed(args.seed)
torch.cuda.manual_seed_all(args.seed)
torch.backends.cudnn.benchmark = True


def spirals(count):
    """`count` points on each of three spirals, with some noise."""
    turn = torch.linspace(0.2, 1.0, count).repeat(3)
    arm = torch.arange(3).repeat_interleave(count)
    angle = 4 * turn + arm * 2 * math.pi / 3 + 0.1 * torch.randn(3 * count)
    return torch.stack([turn * angle.sin(), turn * angle.cos()], dim=1), arm


train_loader = DataLoader(
    TensorDataset(*spirals(100)), batch_size=args.batch_size, shuffle=True, drop_last=True
)
test_points, test_arms = spirals(30)

model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
model.cuda()
criterion = nn.CrossEntropyLoss().cuda()
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
scaler = GradScaler(1024.0, enabled=not args.no_amp)

losses = []
best = 0.0
for epoch in range(args.epochs):
    model.train()
    total = 0.0
    for points, arms in train_loader:
        points = points.cuda(non_blocking=True)
        arms = arms.cuda(non_blocking=True)
        optimizer.zero_grad()
        with autocast(not args.no_amp):
            loss = criterion(model(points), arms)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total += loss.item()
    torch.cuda.synchronize()
    losses.append(total / len(train_loader))
    print(f"epoch {epoch}: loss {losses[-1]:.4f}")

    model.eval()
    with torch.no_grad(), autocast(not args.no_amp):
        scores = model(test_points.cuda())
    accuracy = (scores.argmax(1).cpu() == test_arms).float().mean().item()
    torch.cuda.empty_cache()  # there is little memory on this card
    if accuracy >= best:
        best = accuracy
        torch.save(model.state_dict(), args.save)

model.load_state_dict(torch.load(args.save, map_location="cuda"))
Path(args.save).unlink()
print("best accuracy", best)
print("losses", *losses)
