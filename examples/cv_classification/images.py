"""From files to batches: checking, and a data set that draws reproducibly."""

from __future__ import annotations

import hashlib
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from cv_classification.augment import Transform
from cv_classification.config import Config, InputError
from cv_classification.data import Classes, Sample, read_labelled, split
from cv_classification.decode import Cache, read_image
from cv_classification.parallel import tell
from portable_amp import DeviceContext, Ranks, ranks

Draw = tuple[int, int, int]
"""Which sample, in which of its transform's variants, and the seed of the augmentation."""
Batches = DataLoader[tuple[torch.Tensor, int, int]]
"""images: (N, 3, S, S) uint8 RGB, labels: (N,) int64, indexes of the samples: (N,) int64."""
ONE_PROCESS = Ranks()


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
        tell(f"skipped {why}")
    return [sample for sample, why in zip(samples, faults, strict=True) if not why]


class Split(NamedTuple):
    """The labelled images of a run, and a digest that is the same while none changes sides."""

    train: list[Sample]
    validation: list[Sample]
    classes: Classes
    digest: str
    cache: Cache | None


def read_split(config: Config, *, skip_bad: bool = False, cached: bool = True) -> Split:
    """The images that a run trains on, and those it holds out; `cached` as the settings say.

    Raises:
        InputError: tables or images cannot be used.
    """
    samples, classes = read_labelled(config.data.path)
    samples = check_images(samples, skip_bad=skip_bad)
    parts = split(samples, classes, config.data, config.seed)
    ids = [sorted((sample.id, sample.label) for sample in part) for part in parts]
    digest = hashlib.sha256(repr((ids, classes)).encode()).hexdigest()
    folder, bound = config.data.cache, config.data.cache_gb
    cache = None
    if cached and folder:
        cache = Cache(folder, [sample.path for sample in samples], bound)
    return Split(*parts, classes, digest, cache)


class ImageDataset(Dataset[tuple[torch.Tensor, int, int]]):
    """Samples as `image: (3, S, S) uint8 RGB, label, index`; normalising is the model's part."""

    def __init__(
        self, samples: Sequence[Sample], transform: Transform, cache: Cache | None = None
    ) -> None:
        self.samples = list(samples)
        self.transform = transform
        self.read = cache.read if cache else read_image

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, int, int]:
        return self._draw(draw, self._read(draw))

    def __getitems__(self, draws: Sequence[Draw]) -> list[tuple[torch.Tensor, int, int]]:
        """A batch, decoded in as many threads as torch computes in: both never do at once."""
        threads = 1 if get_worker_info() else torch.get_num_threads()
        if threads == 1:
            return [self[draw] for draw in draws]
        with ThreadPoolExecutor(threads) as pool:  # decoders let other threads run
            coming = deque(pool.submit(self._read, draw) for draw in draws[: 2 * threads])
            made = []
            for number, draw in enumerate(draws, 2 * threads):
                picture = coming.popleft().result()
                if number < len(draws):
                    coming.append(pool.submit(self._read, draws[number]))
                made.append(self._draw(draw, picture))
            return made

    def _read(self, draw: Draw) -> npt.NDArray[np.uint8]:
        return self.read(self.samples[draw[0]].path)

    def _draw(self, draw: Draw, picture: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, int, int]:
        index, variant, seed = draw
        self.set_random_seed(seed)
        image = self.transform(picture, variant)
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(channels_first), self.samples[index].label, index

    def set_random_seed(self, seed: int) -> None:
        """Seed the augmentation, which has generators of its own and a copy in every worker."""
        self.transform.set_random_seed(seed)


class Draws(Sampler[Draw]):
    """What this process trains on in an epoch: a function of the seed and the epoch alone.

    So neither workers nor an interruption change what a run sees. Set `epoch` before each one, and
    `done` to the draws that were made before an interruption.
    """

    def __init__(
        self, labels: Sequence[int], stages: Sequence[Sequence[int]], config: Config
    ) -> None:
        self.labels = np.asarray(labels)
        self.stages = [np.asarray(stage) for stage in stages]
        self.config = config
        self.epoch = self.done = 0
        # Of all processes together; each gets as many as the others.
        together = len(self._pool(np.random.default_rng(0))) * (
            len(self.stages[0]) if config.data.offline else 1
        )
        self.count = together // ranks().world_size

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Draw]:
        random = np.random.default_rng((self.config.seed, self.epoch))
        stage = self.stages[len(self.stages) * self.epoch // self.config.train.epochs]
        pool = self._pool(random)
        if self.config.data.offline:  # every image in every variant
            pool, variants = np.repeat(pool, len(stage)), np.tile(stage, len(pool))
        else:
            variants = random.choice(stage, len(pool))
        order = random.permutation(len(pool))
        seeds = random.integers(2**32, size=len(pool))
        mine = order[ranks().rank :: ranks().world_size][self.done : self.count]
        drawn = zip(pool[mine].tolist(), variants[mine].tolist(), seeds[mine].tolist(), strict=True)
        return iter(drawn)

    def _pool(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """The images of an epoch, in no order, rare classes as often as the settings say."""
        every, counts = np.arange(len(self.labels)), np.bincount(self.labels)
        if self.config.data.balance == "copies":
            members = [every[self.labels == label] for label in np.flatnonzero(counts)]
            return np.concatenate([np.resize(images, counts.max()) for images in members])
        if self.config.data.balance == "sampler":
            weights = 1 / counts[self.labels]
            return random.choice(every, len(every), p=weights / weights.sum())
        return every


def evaluation_draws(
    count: int, stage: Sequence[int] = (0,), views: int = 1, *, share: Ranks = ONE_PROCESS
) -> list[Draw]:
    """Every image once, or in so many random views, the same ones each time it is asked for.

    Processes that share the work all get as many, for some of them can only run in step; the last
    ones get some images twice, in all their views, so that the mean over them is the same.
    """
    random = np.random.default_rng(count)
    images = np.repeat(np.arange(count), views)
    size = -(-count // share.world_size) * share.world_size * views
    variants = random.choice(np.asarray(stage), len(images))
    seeds = random.integers(2**32, size=len(images))
    draws = list(zip(images.tolist(), variants.tolist(), seeds.tolist(), strict=True))
    return (draws * share.world_size)[:size][share.rank :: share.world_size]


def make_loader(
    dataset: ImageDataset, draws: Draws | list[Draw], ctx: DeviceContext, config: Config
) -> Batches:
    """Batches for the device, in training all of one shape: some devices compile for each.

    What is left over at the end of an epoch is not trained on, unless it is all there is.
    """
    size = config.data.batch_size // (ranks().world_size if isinstance(draws, Draws) else 1)
    options = ctx.loader_options(
        config.data.workers,
        seed=0,  # a generator of the loader's own, or it would advance the one dropout draws from
        batch_size=size,
        drop_last=isinstance(draws, Draws) and len(draws) >= size,
        worker_init_fn=start_worker,
    )
    return DataLoader(dataset, sampler=draws, **options)


def ahead(batches: Batches, ctx: DeviceContext) -> Iterator[list[torch.Tensor]]:
    """The same batches; images and labels, and not the indexes, wait on the device."""
    return ctx.prefetch(batches, lambda batch: [*ctx.to(batch[:2]), batch[2]])


def start_worker(worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
