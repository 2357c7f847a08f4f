"""The example's rendered pages: 17 kinds, the same on every machine, and harder to be tested on."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from cv_classification.config import InputError
from cv_classification.data import read_labelled, read_rows, read_unlabelled
from cv_classification.demo import write_pictures
from demo_images import documents

RARE = {"application_for_payment", "resume", "statement_of_opinion"}
ALIKE = ["confirmation_of_admission", "diagnosis", "medical_outpatient_certificate"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "data"
    write_pictures(folder, documents.documents(train=90, test=50))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


def page(name: str, seed: int = 0) -> Image.Image:
    return documents._render(list(documents.PAGES).index(name), np.random.default_rng(seed))


def test_tables_and_folders_tell_the_same(pages: Path) -> None:
    learned, classes = read_labelled(pages)
    asked, answers = read_unlabelled(pages), read_rows(pages / "answers.csv")
    assert classes.targets == tuple(range(17))
    assert len(set(classes.names)) == 17
    assert (len(learned), len(asked)) == (90, 50)
    assert [sample.id for sample in asked] == [name for name, _ in answers]
    assert {sample.path for sample in learned} == set((pages / "train").iterdir())
    assert {sample.path for sample in asked} == set((pages / "test").iterdir())
    assert {target for _, target in read_rows(pages / "sample_submission.csv")} == {0}
    assert len({target for _, target in answers}) == 17
    assert {path.name for path in pages.iterdir()} == {
        *("train", "test", "train.csv", "answers.csv", "sample_submission.csv", "meta.csv")
    }


def test_rare_kinds_have_a_third_of_the_pages(pages: Path) -> None:
    samples, classes = read_labelled(pages)
    counts = Counter(classes.names[sample.label] for sample in samples)
    assert {name for name, count in counts.items() if count == 2} == RARE
    assert {count for name, count in counts.items() if name not in RARE} == {6}


def test_pages_are_pictures_of_many_sizes(pages: Path) -> None:
    for part, least, most in (("train", 180, 420), ("test", 180, 600)):
        sizes = set()
        for path in (pages / part).iterdir():
            with Image.open(path) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert np.asarray(image).std() > 10
                sizes.add(image.size)
        assert least <= min(max(size) for size in sizes)
        assert max(max(size) for size in sizes) <= most
        assert len(sizes) > 40
        assert min(h / w for w, h in sizes) < 0.9 < 1.1 < max(h / w for w, h in sizes)


def test_fewer_pages_are_the_first_of_more(pages: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "few", documents.documents(train=20, test=10))
    everything, few = files(pages), files(tmp_path / "few")
    assert len(few) == 30
    assert few == {name: everything[name] for name in few}
    assert read_rows(tmp_path / "few/train.csv") == read_rows(pages / "train.csv")[:20]
    assert read_rows(tmp_path / "few/answers.csv") == read_rows(pages / "answers.csv")[:10]


def test_pages_are_a_function_of_the_seed(pages: Path, tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    write_pictures(tmp_path / "same", documents.documents(train=5, test=5, seed=0))
    write_pictures(tmp_path / "other", documents.documents(train=5, test=5, seed=1))
    same, other, everything = files(tmp_path / "same"), files(tmp_path / "other"), files(pages)
    assert all(everything[name] == content for name, content in same.items())
    assert all(everything[name] != content for name, content in other.items())
    assert len(set(everything.values())) == 140


def test_pages_of_a_kind_differ_and_alike_kinds_are_alike() -> None:
    """Seen small, as a model sees them: two forms are nearer to each other than to a card."""

    def seen(name: str) -> npt.NDArray[np.float64]:
        small = [page(name, seed).convert("L").resize((24, 24)) for seed in range(12)]
        assert len({image.tobytes() for image in small}) == 12
        total: npt.NDArray[np.float64] = sum(np.asarray(image, float) for image in small)
        return total / 12

    first, *others = (seen(name) for name in ALIKE)
    for form in others:
        assert np.abs(form - first).mean() < np.abs(seen("medical_bill") - first).mean()
        assert np.abs(form - first).mean() < np.abs(seen("driver_license") - first).mean() / 3


def test_training_pages_are_upright_and_clean() -> None:
    """Paper is one colour; a title stands above, and the fields of a passport below."""
    for name, layout in documents.PAGES.items():
        image = page(name)
        assert len({image.getpixel((x, 0)) for x in range(image.width)}) == 1
        assert (image.height > image.width) == (layout["aspect"] > 1)


def test_test_pages_are_turned_flipped_and_spoilt() -> None:
    """An arrow's corners come to lie everywhere, on white or on grey."""
    arrow = Image.new("RGB", (200, 300), "white")
    arrow.paste("red", (0, 0, 60, 60))
    angles, corners, noise = [], set(), []
    for seed in range(60):
        image = documents._spoil(arrow, np.random.default_rng(seed))
        pixels = np.asarray(image).astype(int)
        y, x = np.nonzero(pixels[..., 0] - pixels[..., 2] > 120)
        angles.append(np.arctan2(y.mean() - image.height / 2, x.mean() - image.width / 2))
        corners.add(round(float(np.median(pixels[:4, :4])) / 20))
        blank = documents._spoil(Image.new("RGB", (90, 90), "gray"), np.random.default_rng(seed))
        y, x = blank.height // 2, blank.width // 2
        noise.append(np.asarray(blank)[y - 20 : y + 20, x - 20 : x + 20].std())
    assert np.histogram(angles, bins=8, range=(-np.pi, np.pi))[0].min() >= 2
    assert {8, 13} <= corners  # 160 / 20 and 255 / 20
    assert min(noise) < 4 < 12 < max(noise)


def test_what_is_there_stays(pages: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pages.rglob("*")}
    write_pictures(pages, documents.documents(train=3, test=3, seed=5))
    assert {path: path.stat().st_mtime_ns for path in pages.rglob("*")} == before


def test_interrupted_pages_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def interrupt(page: Image.Image, rng: np.random.Generator) -> Image.Image:
        drawn.append(next(tmp_path.rglob("train.csv")))  # half of it is written
        raise KeyboardInterrupt

    monkeypatch.setattr(documents, "_spoil", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pictures(tmp_path / "data", documents.documents(train=3, test=3))
    assert len(drawn) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        write_pictures(tmp_path / "data", documents.documents(train=1, test=1))
    assert (tmp_path / "data").read_text() == "mine"
