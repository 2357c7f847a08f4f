"""Reconstruct smooth curves with an autoencoder. A class does the training."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass
class Settings:
    epochs: int = 8
    batch: int = 32
    lr: float = 5e-3
    seed: int = 0


class Curves(torch.utils.data.Dataset):
    """Sums of two sines; each item is a curve of 32 samples."""

    def __init__(self, count):
        time = torch.linspace(0, 6.28, 32)
        phase = torch.rand(count, 2, 1) * 6.28
        self.curves = (time + phase[:, 0]).sin() + 0.5 * (2 * time + phase[:, 1]).sin()

    def __len__(self):
        return len(self.curves)

    def __getitem__(self, index):
        return self.curves[index]


class Autoencoder(nn.Module):
    def __init__(self, width=48, code=4):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, code))
        self.decode = nn.Sequential(nn.Linear(code, width), nn.GELU(), nn.Linear(width, 32))

    def forward(self, x):
        return self.decode(self.encode(x))


class Trainer:
    """Owns the model, the optimizer and the loop; `device` is the card to train on."""

    def __init__(self, model, settings, device="cuda:0"):
        self.settings = settings
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
        self.mean = torch.zeros(32, device="cuda:0")
        self.losses = []

    def step(self, x):
        x = x.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.amp.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.mse_loss(self.model(x - self.mean), x)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()

    def epoch(self, loader):
        losses = [self.step(x) for x in loader]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.losses.append(sum(losses) / len(losses))

    def fit(self, loader):
        while len(self.losses) < self.settings.epochs:
            self.epoch(loader)
        return self.losses

    def save(self, path):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "scaler": self.scaler.state_dict(), "losses": self.losses}, path)

    def resume(self, path):
        state = torch.load(path, map_location="cuda:0", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.losses = state["losses"]


def main():
    settings = Settings()
    torch.manual_seed(settings.seed)
    torch.cuda.manual_seed(settings.seed)
    loader = torch.utils.data.DataLoader(Curves(192), batch_size=settings.batch, shuffle=True)

    first = Trainer(Autoencoder(), Settings(epochs=settings.epochs // 2))
    first.fit(loader)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half.pt"
        first.save(checkpoint)
        second = Trainer(Autoencoder(), settings)
        second.resume(checkpoint)
    print("losses", *second.fit(loader))


if __name__ == "__main__":
    main()
