# %% [markdown]
# Predict the next value of a noisy wave with a small convolution, in functions.

# %%
import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import amp, cuda, nn
from torch.utils.data import DataLoader, TensorDataset

DEVICE = "cuda"


# %%
def seed(value: int) -> None:
    random.seed(value)
    torch.manual_seed(value)
    cuda.manual_seed_all(value)


def wave(count: int, window: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    start = torch.rand(count, 1) * 100
    steps = start + torch.arange(window + 1) * 0.4
    values = steps.sin() + 0.05 * torch.randn(count, window + 1)
    return values[:, None, :-1], values[:, -1:]


def network(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, width, 5), nn.ReLU(), nn.Flatten(), nn.Linear(width * 12, 1)
    ).cuda()


# %%
@amp.autocast("cuda")
def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@torch.no_grad()
@cuda.amp.autocast()
def evaluate(model: nn.Module, loader: DataLoader) -> float:
    errors = [F.mse_loss(model(x.to("cuda")), y.to("cuda")) for x, y in loader]
    return torch.stack(errors).mean().item()


def train(model: nn.Module, loader: DataLoader, scaler, optimizer) -> float:
    total = torch.zeros((), device=DEVICE)
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(predict(model, x.to(DEVICE)).float(), y.to(DEVICE))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total += loss.detach()
    cuda.synchronize()
    return (total / len(loader)).item()


# %%
def run(epochs: int = 6) -> list[float]:
    seed(0)
    loaders = partial(DataLoader, batch_size=32, pin_memory=True)
    train_loader = loaders(TensorDataset(*wave(256)), shuffle=True)
    test_loader = loaders(TensorDataset(*wave(64)))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = cuda.amp.GradScaler(init_scale=2.0**10)
    losses = []
    for _ in range(epochs):
        train(model, train_loader, scaler, optimizer)
        losses.append(evaluate(model, test_loader))
        cuda.empty_cache()
    if cuda.is_available():
        print(f"peak memory: {cuda.max_memory_allocated() / 2**20:.1f} MiB")
    return losses


# %%
print("losses", *run())
