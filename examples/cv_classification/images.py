"""From files to batches: decoding, checking, and a data set that draws reproducibly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler

from cv_classification.augment import Transform
from cv_classification.config import Config, InputError
from cv_classification.data import Classes, Sample, read_labelled, split
from portable_amp import DeviceContext

Draw = tuple[int, int]
"""Which sample, and the seed of its augmentation."""
Batches = DataLoader[tuple[torch.Tensor, int]]
"""images: (N, 3, S, S) uint8 RGB, labels: (N,) int64."""


def read_image(path: Path, *, draft: bool = False) -> npt.NDArray[np.uint8]:
    """The picture as a viewer shows it: (H, W, 3) uint8 RGB.

    Turned upright as EXIF says, transparency on white, grey and 16-bit values spread to RGB. A
    draft reads all of the file too, but computes a JPEG at an eighth of its size, to check it.

    Raises:
        InputError: there is no such file, or it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if draft:
                image.draft("RGB", (1, 1))
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image") from None
    # A damaged file makes decoders raise whatever they stumble over, not only OSError.
    except Exception as error:
        raise InputError(f"{path}: truncated or damaged ({error or type(error)})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip to 8 and not scale
        high = np.asarray(image).clip(0, 65535) / 257
        return Image.fromarray(high.round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point values, whose range nothing tells")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return image.convert("RGB")


def check_images(samples: Sequence[Sample], *, skip_bad: bool = False) -> list[Sample]:
    """The samples whose images can be decoded; all are tried, before anything is written.

    Raises:
        InputError: some cannot, and are not to be skipped (they are named), or none can.
    """

    def fault(sample: Sample) -> str | None:
        try:
            read_image(sample.path, draft=True)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:  # decoders let other threads run
        faults = list(pool.map(fault, samples))
    bad = [fault for fault in faults if fault]
    if bad and (len(bad) == len(samples) or not skip_bad):
        more = "; ..." if len(bad) > 3 else ""
        named = "; ".join(bad[:3])
        raise InputError(f"{len(bad)} of {len(samples)} images cannot be read: {named}{more}")
    for why in bad:
        print(f"skipped {why}")
    return [sample for sample, why in zip(samples, faults, strict=True) if not why]


class Split(NamedTuple):
    """The labelled images of a run, and a digest that is the same while none changes sides."""

    train: list[Sample]
    validation: list[Sample]
    classes: Classes
    digest: str


def read_split(config: Config, *, skip_bad: bool = False) -> Split:
    """The images that a run trains on, and those it holds out.

    Raises:
        InputError: tables or images cannot be used.
    """
    samples, classes = read_labelled(config.data.path)
    samples = check_images(samples, skip_bad=skip_bad)
    parts = split(samples, classes, config.data.validation, config.seed)
    ids = [sorted((sample.id, sample.label) for sample in part) for part in parts]
    return Split(*parts, classes, hashlib.sha256(repr((ids, classes)).encode()).hexdigest())


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """Samples as `image: (3, S, S) uint8 RGB, label`; the model normalises, on the device."""

    def __init__(self, samples: Sequence[Sample], transform: Transform) -> None:
        self.samples = list(samples)
        self.transform = transform

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, int]:
        index, seed = draw
        self.set_random_seed(seed)
        image = self.transform(read_image(self.samples[index].path))
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(channels_first), self.samples[index].label

    def set_random_seed(self, seed: int) -> None:
        """Seed the augmentation, which has generators of its own and a copy in every worker."""
        self.transform.set_random_seed(seed)


class Draws(Sampler[Draw]):
    """Every sample once, each with the seed of its augmentation: a function of seed and epoch.

    So neither workers nor an interruption change what a run sees. Set `epoch` before each one.
    Without a seed: in order, for evaluation.
    """

    def __init__(self, count: int, seed: int | None = None) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Draw]:
        if self.seed is None:
            return iter([(index, 0) for index in range(self.count)])
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.count).tolist()
        return iter(zip(order, random.integers(2**32, size=self.count).tolist(), strict=True))


def make_loader(dataset: ImageDataset, draws: Draws, ctx: DeviceContext, config: Config) -> Batches:
    """Batches for the device, in training all of one shape: some devices compile for each.

    What is left over at the end of an epoch is not trained on, unless it is all there is.
    """
    size = config.data.batch_size
    options = ctx.loader_options(
        config.data.workers,
        seed=0,  # a generator of the loader's own, or it would advance the one dropout draws from
        batch_size=size,
        drop_last=draws.seed is not None and len(draws) >= size,
    )
    return DataLoader(dataset, sampler=draws, **options)
