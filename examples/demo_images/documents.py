"""Rendered pages of 17 kinds: upright to train with, any way round and spoilt to be tested on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from demo_images import Picture, Pictures

LAYOUTS = yaml.safe_load(Path(__file__).with_name("layouts.yaml").read_text(encoding="utf-8"))
PAGES, TEXTS, SHAPES = LAYOUTS["pages"], LAYOUTS["texts"], LAYOUTS["shapes"]
DECK = [label for label, page in enumerate(PAGES.values()) for _ in range(page["share"])]
Rng = np.random.Generator
Span = tuple[float, float]


def documents(train: int = 2000, test: int = 1000, seed: int = 0) -> Pictures:
    """So many pages; each depends on seed and number only, so fewer are the first of more."""
    return Pictures(list(PAGES), _pages("train", train, seed), _pages("test", test, seed))


def _pages(part: str, number: int, seed: int) -> Iterator[Picture]:
    test = part == "test"
    for index in range(number):
        deal, place = divmod(index, len(DECK))  # the deck is shuffled anew for each deal
        order = np.random.default_rng((seed, test, deal)).permutation(len(DECK))
        label = DECK[order[place]]
        rng = np.random.default_rng((seed, test, deal, place))
        page = _spoil(_render(label, rng), rng) if test else _render(label, rng)
        file = io.BytesIO()
        page.save(file, "JPEG", quality=int(rng.integers(50, 96)))
        yield f"{part}-{index:05}.jpg", label, file.getvalue()


def _render(label: int, rng: Rng) -> Image.Image:
    """A page of that class, upright and clean."""
    name, layout = list(PAGES.items())[label]
    longer, aspect = rng.integers(180, 421), layout["aspect"] * rng.uniform(0.92, 1.08)
    width, height = round(longer / max(1, aspect)), round(longer * min(1, aspect))
    page = Image.new("RGB", (width, height), layout["paper"])
    draw, rows = ImageDraw.Draw(page), [row.split(":") for row in layout["rows"]]
    ends = _divide(height, [float(share) for _, share in rows], rng)
    for (cells, _), vertical in zip(rows, ends, strict=True):
        kinds = cells.split("+")
        for kind, horizontal in zip(kinds, _divide(width, [1] * len(kinds), rng), strict=True):
            _paint(draw, kind, horizontal, vertical, longer / 42, name, rng)
    return page


def _divide(length: float, shares: list[float], rng: Rng) -> list[Span]:
    """Where each of the parts begins and ends, more or less, with margins."""
    ends = np.cumsum([0, *(shares * rng.uniform(0.75, 1.3, len(shares)))])
    cuts = length * (0.05 + 0.9 * ends / ends[-1])
    return [(a + 0.01 * length, b - 0.01 * length) for a, b in pairwise(cuts.tolist())]


def _paint(
    draw: ImageDraw.ImageDraw, kind: str, across: Span, down: Span, unit: float, name: str, rng: Rng
) -> None:
    """Draw one cell of a page called `name`, whose small print is `unit` high."""
    (left, right), (top, bottom) = across, down
    width, x, y = right - left, (left + right) / 2, (top + bottom) / 2
    ink, r = "white" if name == "car_dashboard" else "black", min(width, bottom - top) / 2

    def write(at: Span, text: str, size: float = unit, anchor: str = "la") -> None:
        draw.text(at, text, ink, _font(max(4, round(size))), anchor)

    def words(room: float) -> str:
        letters = rng.integers(97, 123, max(2, int(1.8 * room / unit)), np.uint8)
        letters[rng.random(len(letters)) < 0.15] = ord(" ")
        return letters.tobytes().decode()

    for shape, *corners, fill, outline in SHAPES.get(kind, ()):
        box = np.tile((x, y), 2) + r * np.array(corners)
        getattr(draw, shape)(box.tolist(), fill=fill, outline=outline, width=2)
    if kind in ("title", "plate"):
        text = name.replace("_", " ").upper() if kind == "title" else words(3.4 * unit).upper()
        write((x, y), text, min(2 * r, 1.5 * width / len(text)), "mm")
    elif kind == "barcode":
        for bar in rng.uniform(left, right, 30).tolist():
            draw.line((bar, top, bar, bottom), ink, int(rng.integers(1, 3)))
    elif kind == "sign":
        stroke = np.sort(rng.uniform(left, right, 12)), rng.uniform(top, bottom, 12)
        draw.line(np.stack(stroke, 1).ravel().tolist(), "darkblue", 2)
    elif kind in TEXTS:
        columns, least, most, rule = TEXTS[kind]
        step, lines = width / columns, np.arange(top, bottom - unit, 1.6 * unit).tolist()
        for start, line in product(np.linspace(left, right, columns, False).tolist(), lines):
            if rule == "box":
                draw.rectangle((start, line, start + step, line + 1.6 * unit), None, "gray")
            elif rule == "under":
                draw.line((start + 0.4 * step, line + unit, start + step, line + unit), ink)
            write((start + 2, line), words(step * rng.uniform(least, most)))


def _spoil(page: Image.Image, rng: Rng) -> Image.Image:
    """As a scanner that nobody watched has it: flipped, turned, blurred and noisy."""
    turn = Image.Transpose
    for flip in (turn.FLIP_LEFT_RIGHT, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE):
        page = page.transpose(flip) if rng.random() < 0.5 else page
    grey = 3 * (int(rng.choice([255, 255, 160])),)
    page = page.rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR, expand=True, fillcolor=grey)
    page = page.filter(ImageFilter.BoxBlur(rng.uniform(0, 2)))
    noise = rng.standard_normal((page.height, page.width, 1), np.float32) * rng.uniform(0, 30)
    return Image.fromarray((np.asarray(page) + noise).clip(0, 255).astype(np.uint8))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
