"""The example's pictures: decoding, augmentation that differs where it should, and views."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cv_classification.augment import PRESETS, Transform
from cv_classification.config import Config, DataConfig, InputError
from cv_classification.data import Sample
from cv_classification.images import Draws, ImageDataset, check_images, make_loader, read_image
from cv_classification.tta import VIEWS, merge, probabilities, rotate, stack_views
from portable_amp import DeviceContext

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
    return [image.numpy().tobytes() for images, _ in loader for image in images]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("preset", ["digits", "documents"])
def test_no_image_is_augmented_twice_alike(preset: str, workers: int, tmp_path: Path) -> None:
    """One picture, twelve times an epoch: all differ, over workers and over epochs."""

    def run() -> list[list[bytes]]:
        dataset = ImageDataset(
            [gradient(tmp_path)] * 12, Transform(PRESETS[preset], 24, training=True)
        )
        draws = Draws(12, seed=5)
        config = Config(data=DataConfig(batch_size=3, workers=workers))
        loader = make_loader(dataset, draws, CPU, config)
        assert loader.persistent_workers == (workers > 0)
        epochs = []
        for draws.epoch in range(2):
            epochs.append(views_seen(loader))
        return epochs

    first, second = run()
    assert len(set(first + second)) == 24
    assert run() == [first, second]


def test_workers_without_seeded_draws_differ_too(tmp_path: Path) -> None:
    """What the library does for a data set with set_random_seed, in a plain loader."""

    class Plain(ImageDataset):
        def __getitem__(self, index: Any) -> Any:
            return torch.from_numpy(self.transform(read_image(self.samples[index].path)))

        def __len__(self) -> int:
            return len(self.samples)

    dataset = Plain([gradient(tmp_path)] * 8, Transform(PRESETS["digits"], 24, training=True))
    dataset.set_random_seed(0)
    loader: Any = DataLoader(dataset, **CPU.loader_options(2, seed=1))
    seen = [image.numpy().tobytes() for _ in range(2) for image in loader]
    assert len(set(seen)) == 16


def test_transforms_do_not_toss_the_same_coin() -> None:
    """Flips and a transpose give all eight symmetries, each about as often."""
    flips = tuple(row for row in PRESETS["documents"].train[:3])
    assert [kind.__name__ for kind, _ in flips] == ["HorizontalFlip", "VerticalFlip", "Transpose"]
    symmetries = Transform(
        type(PRESETS["none"])(keep_aspect=False, fill=0, train=flips, views=()), 2, training=True
    )
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    seen: dict[bytes, int] = {}
    for seed in range(400):
        symmetries.set_random_seed(seed)
        view = symmetries(picture).tobytes()
        seen[view] = seen.get(view, 0) + 1
    assert len(seen) == 8
    assert min(seen.values()) > 25


@pytest.mark.parametrize("preset", PRESETS)
def test_data_sets_travel_to_spawned_workers(preset: str, tmp_path: Path) -> None:
    dataset = ImageDataset([gradient(tmp_path)], Transform(PRESETS[preset], 24, training=True))
    (image, label), (same, _) = dataset[0, 5], pickle.loads(pickle.dumps(dataset))[0, 5]
    assert torch.equal(image, same)
    assert label == 0


def test_evaluation_draws_nothing_and_keeps_the_order(tmp_path: Path) -> None:
    assert list(Draws(3)) == [(0, 0), (1, 0), (2, 0)]
    transform = Transform(PRESETS["documents"], 24, training=False)
    image = read_image(gradient(tmp_path).path)
    assert np.array_equal(transform(image), image)


def test_training_draws_each_sample_once_and_drops_the_tail() -> None:
    draws = Draws(10, seed=3)
    first = list(draws)
    assert sorted(index for index, _ in first) == list(range(10))
    assert first == list(draws)
    draws.epoch = 1
    assert first != list(draws)
    dataset: Any = list(range(10))
    config = Config(data=DataConfig(batch_size=4))
    assert len(make_loader(dataset, draws, CPU, config)) == 2
    assert len(make_loader(dataset, Draws(10), CPU, config)) == 3
    assert len(make_loader(dataset, Draws(3, seed=0), CPU, config)) == 1


def test_documents_are_padded_with_white_and_digits_stretched() -> None:
    page = np.zeros((10, 20, 3), dtype=np.uint8)
    padded = Transform(PRESETS["documents"], 20, training=False)(page)
    assert padded.shape == (20, 20, 3)
    assert padded[0].min() == padded[-1].min() == 255
    assert padded[10].max() == 0
    assert Transform(PRESETS["digits"], 20, training=False)(page).max() == 0


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
    assert views.dtype is torch.float32
    for view, image in zip(views, images, strict=True):
        expected = ORACLES[name](image.permute(1, 2, 0).numpy())
        assert np.array_equal(view.permute(1, 2, 0).numpy(), expected.astype(np.float32))


def test_rotation_turns_counter_clockwise() -> None:
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(rotate(images, 90), torch.rot90(images, 1, (-2, -1)))
    torch.testing.assert_close(rotate(images, 0), images)
    flat = torch.full((1, 3, 8, 8), 7.0)
    torch.testing.assert_close(rotate(flat, 5), flat)  # no black corners
    torch.testing.assert_close(VIEWS["rotate-5"](images), rotate(images, -5))


def test_presets_name_views_that_keep_the_class() -> None:
    for preset in PRESETS.values():
        assert preset.views[0] == "identity"
        assert set(preset.views) <= VIEWS.keys()
    flips = {"fliplr", "flipud", "transpose"}
    assert not flips & set(PRESETS["digits"].views)
    assert flips <= set(PRESETS["documents"].views)


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
    batches: Any = [(images[:3], None), (images[3:], None)]
    names = ("identity", "fliplr", "flipud")
    probs = probabilities(Corner(), batches, CPU, names)
    corners = [images[:, :, row, column] for row, column in ((0, 0), (0, 3), (3, 0))]
    expected = sum((corner.float() / 64).softmax(1) for corner in corners) / 3
    torch.testing.assert_close(probs, expected)
    assert len({tuple(row) for row in itertools.chain(probs.tolist())}) == 5
