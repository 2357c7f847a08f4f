"""What makes the example fast leaves what it computes as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from cv_classification import decode
from cv_classification.augment import Transform, find_preset
from cv_classification.config import InputError
from cv_classification.data import Sample
from cv_classification.decode import Cache, read_image
from cv_classification.images import ImageDataset, evaluation_draws
from cv_classification.model import Classifier
from cv_classification.tta import VIEWS, probabilities
from portable_amp import DeviceContext

GB = 1e-9


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Five images of several kinds; the photo lies on its side."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    made = []
    for number, (name, mode) in enumerate(
        [("a.png", "RGB"), ("b.jpg", "RGB"), ("c.png", "L"), ("d.png", "RGBA"), ("e.jpg", "RGB")]
    ):
        noise = random.integers(256, size=(20 + number, 30, 4), dtype=np.uint8)
        exif = Image.Exif()
        exif[decode.TURNED] = 6 if name == "e.jpg" else 1
        Image.fromarray(noise[..., :3]).convert(mode).save(folder / name, exif=exif)
        made.append(folder / name)
    return made


def test_the_cache_gives_what_the_files_hold(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", paths, 1.0)
    truth = [read_image(path) for path in paths]
    assert truth[4].shape == (30, 24, 3)
    for _ in range(2):
        for path, image in zip(paths, truth, strict=True):
            assert np.array_equal(cache.read(path), image)
    monkeypatch.setattr(decode, "read_image", lambda path: pytest.fail(f"{path} decoded again"))
    for again in (cache, Cache(tmp_path / "cache", paths, 1.0)):
        for path, image in zip(paths, truth, strict=True):
            kept = again.read(path)
            assert np.array_equal(kept, image)
            assert not kept.flags.writeable


def test_the_cache_is_bounded(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 40 + 2 * 3 * 30 * 22
    cache = Cache(tmp_path / "cache", paths, bound * GB)
    for path in 2 * paths:
        assert np.array_equal(cache.read(path), read_image(path))
    assert 0 < cache.file.stat().st_size <= bound
    decoded = []
    monkeypatch.setattr(decode, "read_image", decoded.append)
    for path in paths:
        cache.read(path)
    assert decoded == paths[2:]


def test_a_damaged_cache_is_not_believed(paths: list[Path], tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", paths, 1.0)
    for path in paths:
        cache.read(path)
    for change in (lambda data: data ^ 1, lambda data: data * 0):
        data = np.fromfile(cache.file, np.uint8)
        change(data).tofile(cache.file)
        again = Cache(tmp_path / "cache", paths, 1.0)
        for path in 2 * paths:
            assert np.array_equal(again.read(path), read_image(path))
    os.truncate(cache.file, 3)
    again = Cache(tmp_path / "cache", paths, 1.0)
    assert np.array_equal(again.read(paths[4]), read_image(paths[4]))


def test_an_image_that_changed_is_read_anew(paths: list[Path], tmp_path: Path) -> None:
    old = Cache(tmp_path / "cache", paths, 1.0)
    old.read(paths[0])
    Image.new("RGB", (30, 20), "red").save(paths[0])
    new = Cache(tmp_path / "cache", paths, 1.0)
    assert np.array_equal(new.read(paths[0]), read_image(paths[0]))
    assert [*(tmp_path / "cache").glob("*")] == [new.file] != [old.file]


def test_a_folder_in_which_nothing_can_be_made_is_refused(
    paths: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is a file"):
        Cache(paths[0] / "cache", paths, 1.0)


def test_workers_share_the_cache(paths: list[Path], tmp_path: Path) -> None:
    samples = [Sample(path.name, path, 0) for path in paths]
    transform = Transform(find_preset("documents"), 16)
    draws = evaluation_draws(len(paths), (1, 2), 4)
    plain = ImageDataset(samples, transform)
    expected = [plain[draw][0] for draw in draws]
    cached = ImageDataset(samples, transform, Cache(tmp_path / "cache", paths, 1.0))
    for _ in range(2):
        batches = DataLoader(cached, batch_size=None, sampler=draws, num_workers=2)
        for (image, *_), right in zip(batches, expected, strict=True):
            assert torch.equal(image, right)


@pytest.mark.parametrize("chunk", [None, 1, 3, 100])
def test_any_chunk_predicts_what_one_image_and_view_at_a_time_does(
    paths: list[Path], chunk: int | None
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    model = Classifier(net, 16, (0.5, 0.4, 0.3), (0.3, 0.3, 0.3)).eval()
    ctx = DeviceContext("cpu", precision="fp32")
    ctx.__dict__["plan"] = replace(ctx.plan, chunk=chunk)
    samples = [Sample(path.name, path, 0) for path in paths]
    dataset = ImageDataset(samples, Transform(find_preset("documents"), 16))
    draws = evaluation_draws(len(paths))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    found = probabilities(model, DataLoader(dataset, 4, sampler=draws), ctx, (*VIEWS,))
    assert max(seen) <= (chunk or 4)
    assert chunk != 100 or max(seen) == 4 * len(VIEWS)  # few images: their views share a pass
    for index, draw in enumerate(draws):
        image = dataset[draw][0][None].float()
        views = [model(view(image)).softmax(-1)[0] for view in VIEWS.values()]
        expected = torch.stack(views).mean(0)
        assert torch.allclose(found[index], expected, atol=1e-5, rtol=0)
        assert found[index].argmax() == expected.argmax()


RANK = """
import sys
import torch
from portable_amp import DeviceContext, context, init_distributed, ranks
init_distributed("cpu")
def never(*args, **kwargs):
    raise AssertionError("rank 1 measured")
if ranks().rank == 1:
    context.tune = never
model = torch.nn.Linear(4, 2).eval()
plan = DeviceContext("cpu").tuned(model, torch.ones(4, 4), cache=False).plan
everyone = [None, None]
torch.distributed.all_gather_object(everyone, plan)
assert everyone[0] == everyone[1] == plan, everyone
assert plan.request == "tuned" and plan.chunk, plan
torch.distributed.destroy_process_group()
"""


def test_rank_0_measures_for_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
