"""The example's pictures: decoding, augmentation that differs where it should, and views."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from cv_classification.augment import PRESETS, Transform, find_preset
from cv_classification.config import Config, DataConfig, InputError, ModelConfig, TrainConfig
from cv_classification.data import Sample
from cv_classification.decode import Cache, read_image
from cv_classification.images import (
    Draws,
    ImageDataset,
    check_images,
    evaluation_draws,
    make_loader,
)
from cv_classification.model import build_model
from cv_classification.tta import VIEWS, merge, probabilities, rotate, stack_views
from portable_amp import DeviceContext
from portable_amp.testing import play

CPU = DeviceContext("cpu", precision="fp32")


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("I;16", 257 * 100, "png", (100, 100, 100)),
        ("I;16", 257 * 200, "tif", (200, 200, 200)),
        ("RGBA", (10, 20, 30, 0), "png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), "png", (204, 204, 204)),
        ("LA", (0, 0), "png", (255, 255, 255)),
        ("CMYK", (0, 0, 0, 255), "tif", (0, 0, 0)),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    mode: str, value: Any, suffix: str, expected: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.new(mode, (3, 2), value).save(path)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert read.shape == (2, 3, 3)
    assert read[0, 0].tolist() == list(expected)


def test_a_palette_may_be_transparent(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 2), 0)
    picture.putpalette([1, 2, 3] * 256)
    picture.save(tmp_path / "clear.png", transparency=bytes([0] * 256))
    assert read_image(tmp_path / "clear.png")[0, 0].tolist() == [255, 255, 255]


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "black")
    picture.paste((255, 255, 255), (0, 0, 10, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    picture.save(tmp_path / "photo.jpg", exif=exif, quality=100)
    read = read_image(tmp_path / "photo.jpg")
    assert read.shape == (20, 10, 3)
    assert read[2, 5].min() > 250
    assert read[17, 5].max() < 5


def gradient(tmp_path: Path) -> Sample:
    values = np.arange(24 * 24 * 3) % 251
    path = tmp_path / "gradient.png"
    Image.fromarray(values.reshape(24, 24, 3).astype(np.uint8)).save(path)
    return Sample("gradient.png", path, 0)


def views_seen(loader: Any) -> list[bytes]:
    return [image.numpy().tobytes() for images, _, _ in loader for image in images]


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("preset", ["digits", "documents"])
def test_no_image_is_augmented_twice_alike(
    preset: str, workers: int, offline: bool, tmp_path: Path
) -> None:
    """One picture, twelve times an epoch: all differ, over workers and over epochs."""

    def run() -> list[list[bytes]]:
        transform = Transform(find_preset(preset), 24)
        dataset = ImageDataset([gradient(tmp_path)] * 12, transform)
        chosen = DataConfig(batch_size=3, workers=workers, offline=offline)
        config = Config(seed=5, data=chosen, train=TrainConfig(epochs=2))
        stages = transform.stages[-1:]  # the weakest one's flips give only eight pictures
        loader = make_loader(dataset, (draws := Draws([0] * 12, stages, config)), CPU, config)
        assert loader.persistent_workers == (workers > 0)
        epochs = []
        for draws.epoch in range(2):
            epochs.append(views_seen(loader))
        return epochs

    first, second = run()
    times = len(Transform(find_preset(preset), 24).stages[-1]) if offline else 1
    assert len(first) == len(second) == 12 * times
    assert len(set(first + second)) == 24 * times
    assert run() == [first, second]


def test_workers_without_seeded_draws_differ_too(tmp_path: Path) -> None:
    """What the library does for a data set with set_random_seed, in a plain loader."""

    class Plain(ImageDataset):
        def __getitem__(self, index: Any) -> Any:
            return torch.from_numpy(self.transform(read_image(self.samples[index].path), 1))

        def __len__(self) -> int:
            return len(self.samples)

    dataset = Plain([gradient(tmp_path)] * 8, Transform(find_preset("digits"), 24))
    dataset.set_random_seed(0)
    loader: Any = DataLoader(dataset, **CPU.loader_options(2, seed=1))
    seen = [image.numpy().tobytes() for _ in range(2) for image in loader]
    assert len(set(seen)) == 16


@pytest.mark.parametrize("preset", ["none", "digits", "documents"])
def test_data_sets_travel_to_spawned_workers(preset: str, tmp_path: Path) -> None:
    dataset = ImageDataset([gradient(tmp_path)], Transform(find_preset(preset), 24))
    one, same = dataset[0, 1, 5], pickle.loads(pickle.dumps(dataset))[0, 1, 5]
    assert torch.equal(one[0], same[0])
    assert one[1:] == (0, 0)


def test_evaluation_draws_nothing_and_keeps_the_order(tmp_path: Path) -> None:
    assert [draw[:2] for draw in evaluation_draws(3)] == [(0, 0), (1, 0), (2, 0)]
    image = read_image(gradient(tmp_path).path)
    assert np.array_equal(Transform(find_preset("documents"), 24)(image), image)


def test_random_views_of_validation_are_the_same_each_time() -> None:
    draws = evaluation_draws(3, (4, 5), 8)
    assert [index for index, _, _ in draws] == [0] * 8 + [1] * 8 + [2] * 8
    assert {variant for _, variant, _ in draws} == {4, 5}
    assert len({seed for _, _, seed in draws}) == 24
    assert draws == evaluation_draws(3, (4, 5), 8)


LABELS = [0] * 6 + [2] * 3 + [3]


def draw(labels: list[int] = LABELS, epochs: int = 1, **data: Any) -> Draws:
    config = Config(seed=3, data=DataConfig(**data), train=TrainConfig(epochs=epochs))
    return Draws(labels, [(1,), (2, 3), (4, 5)], config)


def test_training_draws_each_sample_once_and_drops_the_tail() -> None:
    draws = draw(epochs=2)
    first = list(draws)
    assert sorted(index for index, _, _ in first) == list(range(10))
    assert first == list(draws)
    draws.epoch = 1
    assert first != list(draws)
    dataset: Any = list(range(10))
    config = Config(data=DataConfig(batch_size=4))
    assert len(make_loader(dataset, draws, CPU, config)) == 2
    assert len(make_loader(dataset, evaluation_draws(10), CPU, config)) == 3
    assert len(make_loader(dataset, draw([0, 1, 1]), CPU, config)) == 1


def test_an_epoch_goes_on_where_it_was_left() -> None:
    draws = draw()
    whole = list(draws)
    draws.done = 4
    assert list(draws) == whole[4:]
    draws.done = 10
    assert list(draws) == []


def test_augmentation_grows_with_the_epochs() -> None:
    draws, seen = draw(epochs=7), []
    for draws.epoch in range(7):
        seen.append({variant for _, variant, _ in draws})
    assert seen[:3] == [{1}] * 3
    assert all(found <= {2, 3} for found in seen[3:5])
    assert all(found <= {4, 5} for found in seen[5:])


def test_offline_every_image_comes_in_every_variant() -> None:
    config = Config(data=DataConfig(offline=True), train=TrainConfig(epochs=1))
    draws = Draws(LABELS, [(2, 3)], config)
    assert len(draws) == 20
    assert sorted(d[:2] for d in draws) == [(i, v) for i in range(10) for v in (2, 3)]


def test_rare_classes_are_copied_to_the_size_of_the_commonest() -> None:
    drawn = list(draw(balance="copies"))
    labels = [LABELS[index] for index, _, _ in drawn]
    assert [labels.count(label) for label in range(4)] == [6, 0, 6, 6]
    assert [sum(i == index for i, _, _ in drawn) for index in (6, 7, 8)] == [2, 2, 2]
    assert len({seed for _, _, seed in drawn}) == 18  # each copy is augmented in its own way


def test_the_weighted_sampler_evens_the_classes_out() -> None:
    draws, labels = draw(balance="sampler", epochs=300), []
    assert len(draws) == 10
    for draws.epoch in range(300):
        labels += [LABELS[index] for index, _, _ in draws]
    assert len(labels) == 3000
    for label in (0, 2, 3):
        assert 900 < labels.count(label) < 1100


def test_documents_are_padded_with_white_and_digits_stretched() -> None:
    page = np.zeros((10, 20, 3), dtype=np.uint8)
    padded = Transform(find_preset("documents"), 20)(page)
    assert padded.shape == (20, 20, 3)
    assert padded[0].min() == padded[-1].min() == 255
    assert padded[10].max() == 0
    assert Transform(find_preset("digits"), 20)(page).max() == 0


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif"])
def test_half_an_image_is_found_out(suffix: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(noise).save(path)
    check_images([Sample("whole", path)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(InputError, match="truncated or damaged"):
        check_images([Sample("half", path)])


def test_bad_images_are_skipped_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, gone = gradient(tmp_path), Sample("gone.png", tmp_path / "gone.png", 1)
    with pytest.raises(InputError, match=r"1 of 2 images .*gone\.png: no such file"):
        check_images([good, gone])
    assert check_images([good, gone], skip_bad=True) == [good]
    assert "skipped" in capsys.readouterr().out
    with pytest.raises(InputError, match="1 of 1 images"):
        check_images([gone], skip_bad=True)


PIXELS = np.arange(60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)


def cached(tmp_path: Path) -> Cache:
    if not (tmp_path / "picture.png").exists():
        Image.fromarray(PIXELS).save(tmp_path / "picture.png")
    return Cache(tmp_path / "cache", [tmp_path / "picture.png"], 1.0)


def test_a_cache_has_its_room_on_the_disk(tmp_path: Path) -> None:
    """What is not there when a mapped file is written to ends in SIGBUS."""
    cache = cached(tmp_path)
    size = cache.file.stat().st_size
    assert size == 8 + PIXELS.size
    assert 512 * cache.file.stat().st_blocks >= size
    assert np.array_equal(cache.read(tmp_path / "picture.png"), PIXELS)
    again = cached(tmp_path)  # which leaves what is in it
    assert again.file.read_bytes()[8:] == PIXELS.tobytes()


@pytest.mark.parametrize("function", [True, False])  # macOS has none
def test_a_cache_on_a_full_disk_is_refused(
    function: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if function:
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9000))
    with pytest.raises(InputError, match=r"No space left.*data\.cache_gb"):
        cached(tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    if not function:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
        assert cached(tmp_path).file.stat().st_size == 8 + PIXELS.size


def test_pictures_of_a_hundred_megapixels_are_read_without_a_warning(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "scan.png")
    assert check_images([Sample("scan", tmp_path / "scan.png")])


@pytest.mark.parametrize("size", [(1, 1), (65_500, 1), (1, 65_500)])
@pytest.mark.parametrize("preset", ["none", "documents"])
def test_pictures_of_any_shape_are_fitted(
    preset: str, size: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("L", size, 7).save(tmp_path / "strip.png")
    transform = Transform(find_preset(preset), 24)
    for variant in range(1 + sum(map(len, transform.stages))):
        assert transform(read_image(tmp_path / "strip.png"), variant).shape == (24, 24, 3)


ORACLES: dict[str, Any] = {
    "identity": lambda image: image,
    "fliplr": np.fliplr,
    "flipud": np.flipud,
    "rotate180": lambda image: np.rot90(image, 2),
    "transpose": lambda image: image.transpose(1, 0, 2),
}


@pytest.mark.parametrize("name", ORACLES)
def test_views_are_numpys(name: str) -> None:
    """NumPy's functions are for one image (H, W, C); torch's of the same names are for batches."""
    images = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).reshape(2, 3, 5, 5)
    (views,) = stack_views(images, [name])
    assert views.dtype is torch.uint8
    for view, image in zip(views, images, strict=True):
        expected = ORACLES[name](image.permute(1, 2, 0).numpy())
        assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)


def test_rotation_turns_counter_clockwise() -> None:
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(rotate(images, 90), torch.rot90(images, 1, (-2, -1)))
    torch.testing.assert_close(rotate(images, 0), images)
    flat = torch.full((1, 3, 8, 8), 7.0)
    torch.testing.assert_close(rotate(flat, 5), flat)  # no black corners
    torch.testing.assert_close(VIEWS["rotate-5"](images), rotate(images, -5))
    raw = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(rotate(raw, 5), rotate(raw.float(), 5))
    assert stack_views(raw, ["identity", "rotate+5"]).dtype is torch.float32


def test_presets_name_views_that_keep_the_class() -> None:
    names = yaml.safe_load(PRESETS.read_text("utf-8"))
    assert len(names) > 8
    for name in names:
        views = find_preset(name).views
        assert views[0] == "identity"
        assert set(views) <= VIEWS.keys()
    flips = {"fliplr", "flipud", "transpose"}
    assert not flips & set(find_preset("digits").views)
    assert flips <= set(find_preset("documents").views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_is_the_mean_of_float32_probabilities(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(4, 6, 3)).to(dtype)
    merged = merge(logits)
    assert merged.dtype is torch.float32
    expected = np.mean(
        [torch.softmax(view.float(), -1).numpy() for view in logits], axis=0, dtype=np.float64
    )
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert merge(torch.tensor([[[-5.0, -1.0]]])).isfinite().all()


def test_each_image_gets_the_mean_over_its_own_views() -> None:
    class Corner(torch.nn.Module):
        """Logits: the three channels' upper left pixel."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :, 0, 0] / 64

    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    batches: Any = [(images[:3], None, torch.arange(3)), (images[3:], None, torch.arange(3, 5))]
    names = ("identity", "fliplr", "flipud")
    probs = probabilities(Corner(), batches, CPU, names)
    corners = [images[:, :, row, column] for row, column in ((0, 0), (0, 3), (3, 0))]
    expected = sum((corner.float() / 64).softmax(1) for corner in corners) / 3
    torch.testing.assert_close(probs, expected)
    assert len({tuple(row) for row in itertools.chain(probs.tolist())}) == 5


def test_a_samples_draws_are_averaged_in_any_order() -> None:
    class Level(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).mean(1, keepdim=True) * torch.tensor([1.0, 0.0])

    images = torch.rand(5, 1, 2, 2)
    places = torch.tensor([1, 0, 1, 1, 0])
    batches: Any = [(images[:2], None, places[:2]), (images[2:], None, places[2:])]
    probs = probabilities(Level(), batches, CPU)
    each = Level()(images).softmax(1)
    expected = torch.stack([each[places == place].mean(0) for place in (0, 1)])
    torch.testing.assert_close(probs, expected)


def test_a_model_that_keeps_what_it_computed_is_asked_anew() -> None:
    class Keeping(torch.nn.Module):
        """As LeViT does: what it computes of its weights is kept until it trains."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(2))
            self.kept: torch.Tensor | None = None

        def train(self, mode: bool = True) -> Keeping:
            self.kept = None if mode else self.kept
            return super().train(mode)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.kept is None:
                self.kept = 10 * self.bias
            return self.kept.expand(len(images), 2)

    batches: Any = [(torch.zeros(1, 3, 2, 2), torch.zeros(1), torch.zeros(1, dtype=torch.int64))]
    model = Keeping()
    assert probabilities(model, batches, CPU).tolist() == [[0.5, 0.5]]
    model.bias.data[0] = 1.0
    assert probabilities(model, batches, CPU)[0, 0] > 0.9


def test_dropout_stays_on_for_so_many_passes() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)
    )
    batches: Any = [(torch.rand(6, 1, 2, 2) * 9, None, torch.arange(6))]
    plain = probabilities(model, batches, CPU)
    assert torch.equal(plain, probabilities(model, batches, CPU))
    noisy = [probabilities(model, batches, CPU, passes=passes) for passes in (1, 1, 400)]
    assert not torch.equal(noisy[0], noisy[1])
    assert not any(part.training for part in model.modules())
    assert torch.equal(model[1].running_mean, torch.zeros(4))  # BatchNorm was not in training
    # The mean over many passes is that of the masks, which are 2 ** 4 in each image.
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 4)
    inputs = model[1](batches[0][0].flatten(1))
    exact = torch.stack([model[3](inputs * mask).softmax(1) for mask in masks]).mean(0)
    torch.testing.assert_close(noisy[2], exact, rtol=0, atol=0.06)
    with pytest.raises(InputError, match="no layer that drops"):
        probabilities(torch.nn.Flatten(), batches, CPU, passes=2)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "mobilenetv3_small_050"])
def test_dropout_that_is_no_layer_drops_too(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name=name, drop_rate=0.5)
    model = build_model(config, 3, weights=False)
    batches: Any = [(torch.rand(2, 3, 64, 64) * 255, None, torch.arange(2))]
    plain = probabilities(model, batches, CPU)
    assert not torch.equal(plain, probabilities(model, batches, CPU, passes=1))
    assert torch.equal(plain, probabilities(model, batches, CPU))
    with pytest.raises(InputError, match="no layer that drops"):
        probabilities(build_model(ModelConfig(name=name), 3), batches, CPU, passes=1)


def test_what_overflows_in_16_bits_is_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    torch.nn.init.constant_(model[1].weight, 1e3)
    model[1].weight.data[0] *= 2
    batches: Any = [(torch.tensor([[255.0] * 4, [1.0] * 4]), None, torch.arange(2))]
    with play("t4", live=True):
        ctx = DeviceContext(precision="fp16")
        probs = probabilities(ctx.to(model), batches, ctx)
        model.cpu()
    assert probs.tolist() == [[1.0, 0.0, 0.0]] * 2
    said = capsys.readouterr().out
    assert "answers to 1 of 2 images are not finite in fp16; computing them again in fp32" in said
    model[1].weight.data[0] = torch.nan
    with pytest.raises(InputError, match="answers to 2 of 2 images are not finite;"):
        probabilities(model, batches, CPU)
