"""Image files decoded, and a cache on disk of what was."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cv_classification.config import InputError, check_folder

# Not all that Pillow knows: it would give EPS to another program, and take anything for TGA.
Image.init()
FORMATS = sorted(
    {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
    & Image.OPEN.keys()
)
PIXELS = 500_000_000
"""Of one image, at most: 1.5 GB when decoded; cameras have 200 million."""
Image.MAX_IMAGE_PIXELS = None  # the same, but it would only warn of some
TURNED = 0x0112
"""The EXIF tag of how a picture lies; from 5 on width and height change places."""


def read_image(path: Path, *, draft: bool = False) -> npt.NDArray[np.uint8]:
    """The picture as a viewer shows it: (H, W, 3) uint8 RGB.

    Turned upright as EXIF says, transparency on white, grey and 16-bit values spread to RGB. A
    draft reads all of the file too, but computes a JPEG at an eighth of its size, to check it.

    Raises:
        InputError: there is no such file, or it cannot be decoded.
    """
    with _opened(path) as image:
        if draft:
            image.draft("RGB", (1, 1))
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture, of which the header is read; what goes wrong with it is an InputError.

    Raises:
        InputError: see `read_image`.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise InputError(f"{path}: not a file")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} pixels are too many")
            yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that can be read here") from None
    # A damaged file makes decoders raise whatever they stumble over, not only OSError.
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        why = os.strerror(number).lower() if number else f"truncated or damaged ({error!r})"
        raise InputError(f"{path}: {why}") from error


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


class Place(NamedTuple):
    """Where a cache keeps an image: its number, its first byte, and its shape (H, W, 3)."""

    number: int
    start: int
    shape: tuple[int, int, int]


class Cache:
    """Decoded images in one memory-mapped file of a folder, which workers and ranks share.

    Each is written when it is first read, and its checksum after it: until both are there, and
    whenever they do not agree, it is decoded. Images beyond `bound` GB always are. The file's name
    is a digest of all paths, sizes and times of change; another one in the folder is removed.

    Raises:
        InputError: the folder cannot be made, or written to.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], bound: float) -> None:
        with ThreadPoolExecutor() as pool:
            shapes = list(pool.map(_shape, paths))
        facts = [(str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in paths]
        self.places: dict[str, Place] = {}
        self.length = 8 * len(paths)  # the checksums
        for number, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
            start, size = self.length, int(np.prod(shape))
            if start + size <= bound * 1e9 and str(path) not in self.places:
                self.places[str(path)] = Place(number, start, shape)
                self.length += size
        name = hashlib.sha256(repr((facts, bound)).encode()).hexdigest()[:32]
        self.file = folder / f"{name}.decoded"
        self._bytes: npt.NDArray[np.uint8] | None = None
        check_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.glob("*.decoded"):
                if other != self.file:
                    with contextlib.suppress(OSError):  # where open files cannot be removed
                        other.unlink()
            _allocate(self.file, self.length)
        except OSError as error:
            raise InputError(
                f"data.cache={str(folder)!r}: {error.strerror}; it needs {self.length / 1e9:.3g} "
                "GB, and data.cache_gb can say less"
            ) from error

    def read(self, path: Path) -> npt.NDArray[np.uint8]:
        """As `read_image`."""
        place = self.places.get(str(path))
        if place is None:
            return read_image(path)
        if self._bytes is None:
            self._bytes = np.memmap(self.file, np.uint8, "r+", shape=(self.length,))
        size = int(np.prod(place.shape))
        kept = self._bytes[place.start : place.start + size]
        check = self._bytes[8 * place.number :][:8].view(np.uint64)
        # The upper half tells a checksum that is 0 from none.
        if check[0] == (1 << 32 | zlib.crc32(kept.data)):
            kept.flags.writeable = False
            return kept.reshape(place.shape)
        image = read_image(path)
        if image.shape == place.shape:
            kept[:] = image.reshape(-1)
            check[0] = 1 << 32 | zlib.crc32(image.tobytes())
        return image

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_bytes": None}  # each worker maps the file itself


def _allocate(path: Path, size: int) -> None:
    """Make a file of so many bytes, or leave it as it is, whoever else does the same.

    The disk has room for all of it: else a write into the mapped file would kill the process.

    Raises:
        OSError: the disk is full, or not ours to write to.
    """
    with path.open("ab") as file:  # opened so, what is in it stays
        made = file.tell() == 0
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
                return
            if made and shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.truncate(file.fileno(), size)
        except OSError:
            if made:
                path.unlink()
            raise


def _shape(path: Path) -> tuple[int, int, int]:
    """The shape that `read_image` will return, of the header alone."""
    with _opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(TURNED, 1) in (5, 6, 7, 8)
    return (width, height, 3) if turned else (height, width, 3)
