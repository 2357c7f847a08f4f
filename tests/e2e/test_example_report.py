"""The report: what it says of a small result worked out by hand, and how a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from cv_classification.config import Config
from cv_classification.data import Classes, Sample
from cv_classification.report import Judged, calibration, write_report

from .conftest import write_image

CHROMIUM = shutil.which("chromium")
COLUMNS = ("epoch", "updates", "lr", "loss", "accuracy", "macro_f1", "log_loss", "seconds")
HISTORY = [
    dict(zip(COLUMNS, (epoch, 5 * epoch, 0.1 / epoch, 2 / epoch, 0.6, 0.5, 1.5, 1.0), strict=True))
    for epoch in (1, 2, 3)
]
HOSTILE = '</style><script src="http://x.example/a.js">alert(1)</script>'


class Read(HTMLParser):
    """The tables, headings, images and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.pictures: list[dict[str, str]] = []
        self._cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "img":
            self.pictures.append({name: value or "" for name, value in attrs})
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data


def make(
    folder: Path,
    probs: Sequence[Sequence[float]],
    labels: Sequence[int],
    names: Sequence[str],
    history: Sequence[dict[str, float]] = HISTORY,
    ids: Sequence[str] = (),
) -> Path:
    samples = []
    for index, label in enumerate(labels):
        path = folder / f"{index}.png"
        write_image(path, 40 * (index % 6), seed=index)
        samples.append(Sample(ids[index] if ids else f"image {index}.png", path, label))
    judged = Judged(samples, torch.tensor(probs), Classes(tuple(range(len(names))), tuple(names)))
    settings = Config().model_dump(mode="json")
    page = folder / "report.html"
    write_report(page, "a run", settings, history, judged, "On six <made-up> images.")
    return page


# Three classes: cat twice right and once dog; dog once right, once cat; bird, once cat.
PROBS = (
    (0.9, 0.1, 0.0),
    (0.7, 0.2, 0.1),
    (0.2, 0.8, 0.0),
    (0.3, 0.6, 0.1),
    (0.95, 0.05, 0.0),
    (0.5, 0.3, 0.2),
)
LABELS, NAMES = (0, 0, 0, 1, 1, 2), ("cat", "dog", "bird")


def many(classes: int) -> tuple[list[list[float]], list[int], list[str]]:
    """Two images of each of so many classes; every second is taken for the next class."""
    labels = [label for label in range(classes) for _ in range(2)]
    guesses = [(label + index % 2) % classes for index, label in enumerate(labels)]
    rest = 0.3 / (classes - 1)
    probs = [[0.7 if c == guess else rest for c in range(classes)] for guess in guesses]
    return probs, labels, [f"a_rather_long_class_name_number_{c}" for c in range(classes)]


def test_calibration_is_as_worked_out_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [1.0, 0.0], [0.875, 0.125]])
    # In (0.25, 0.5]: the first, right. In (0.5, 0.75]: two, one right. In (0.75, 1]: two, right.
    error, bins = calibration(probs, [0, 0, 0, 0, 0], bins=4)
    assert bins == [
        (0.25, 0.5, 1, 0.5, 1.0),
        (0.5, 0.75, 2, 0.75, 0.5),
        (0.75, 1.0, 2, 0.9375, 1.0),
    ]
    assert error == pytest.approx((1 * 0.5 + 2 * 0.25 + 2 * 0.0625) / 5)


def test_calibration_of_probabilities_that_are_a_hair_above_one() -> None:
    error, bins = calibration(torch.tensor([[1.0000001, 0.0]]), [1])
    assert [row[:3] for row in bins] == [(14 / 15, 1.0, 1)]
    assert error == pytest.approx(1)


def test_the_numbers_are_those_of_the_result(tmp_path: Path) -> None:
    page = make(tmp_path, PROBS, LABELS, NAMES).read_text("utf-8")
    tiles = dict(re.findall(r"<div>([\w ]+) <b>(.+?)</b></div>", page))
    # F1: cat 2 * 2 / (4 + 3), dog 2 * 1 / (2 + 2), bird none. Each is alone in its bin but one:
    # 0.9, 0.7, 0.6, 0.5 are .1, .3, .4, .5 from right or wrong; 0.8 and 0.95 are wholly wrong.
    assert tiles["accuracy"] == "0.5000"
    assert tiles["macro F1"] == f"{(4 / 7 + 1 / 2) / 3:.4f}"
    assert tiles["images wrong"] == "3 of 6"
    assert tiles["calibration error"] == f"{(0.1 + 0.3 + 0.8 + 0.4 + 0.95 + 0.5) / 6:.4f}"
    assert "On six &lt;made-up&gt; images." in page
    assert "batch_size: 32" in page


def test_the_tables_are_those_of_the_result(tmp_path: Path) -> None:
    classes, confusions, bins = Read(make(tmp_path, PROBS, LABELS, NAMES).read_text("utf-8")).tables
    assert classes == [
        ["Class", "F1", "Precision", "Recall", "Images"],
        ["bird", "0.000", "-", "0.000", "1"],
        ["dog", "0.500", "0.500", "0.500", "2"],
        ["cat", "0.571", "0.500", "0.667", "3"],
    ]
    assert confusions == [
        ["", "cat", "dog", "bird"],
        ["cat", "2", "1", ""],
        ["dog", "1", "1", ""],
        ["bird", "1", "", ""],
    ]
    assert bins[-1] == ["0.93 to 1.00", "0.950", "0.000", "1"]
    assert sum(int(row[-1]) for row in bins[1:]) == 6


def test_the_surest_mistake_comes_first(tmp_path: Path) -> None:
    page = make(tmp_path, PROBS, LABELS, NAMES).read_text("utf-8")
    told = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert [" ".join(re.sub("<.*?>", " ", one).split()) for one in told] == [
        "is dog (5%) taken for cat (95%) image 4.png",
        "is cat (20%) taken for dog (80%) image 2.png",
        "is bird (20%) taken for cat (50%) image 5.png",
    ]


def test_at_most_48_mistakes_are_shown(tmp_path: Path) -> None:
    probs = [[0.4, 0.6]] * 50
    page = make(tmp_path, probs, [0] * 50, ("a", "b")).read_text("utf-8")
    assert page.count("<figcaption>") == 48
    assert "These are 48 of 50." in page


def test_a_class_that_never_occurs_has_no_scores_and_is_last(tmp_path: Path) -> None:
    probs, labels = [[0.0, *row] for row in PROBS], [label + 1 for label in LABELS]
    classes = Read(make(tmp_path, probs, labels, ["fish", *NAMES]).read_text("utf-8")).tables[0]
    assert classes[-1] == ["fish", "-", "-", "-", "0"]


def test_seventeen_classes_are_all_there(tmp_path: Path) -> None:
    probs, labels, names = many(17)
    classes, confusions, _ = Read(make(tmp_path, probs, labels, names).read_text("utf-8")).tables
    assert confusions[0][1:] == [row[0] for row in confusions[1:]] == names
    assert len(classes) == 18
    assert "worst of" not in (tmp_path / "report.html").read_text("utf-8")


def test_of_very_many_classes_the_worst_are_confused(tmp_path: Path) -> None:
    probs, labels, names = many(64)
    probs[0] = probs[2] = probs[1] = [1.0, *[0.0] * 63]  # leaves class 0 better than most
    page = make(tmp_path, probs, labels, names).read_text("utf-8")
    classes, confusions, _ = Read(page).tables
    assert len(classes) == 65
    assert len(confusions) == 61
    assert set(confusions[0][1:]) == {row[0] for row in classes[1:61]}
    assert "the 60 worst of\n64 classes" in page


def test_without_a_history_there_are_no_curves(tmp_path: Path) -> None:
    with_curves = make(tmp_path / "a", PROBS, LABELS, NAMES).read_text("utf-8")
    without = make(tmp_path / "b", PROBS, LABELS, NAMES, history=[]).read_text("utf-8")
    assert ["<h2>Training</h2>" in page for page in (with_curves, without)] == [True, False]
    assert len(Read(with_curves).pictures) - len(Read(without).pictures) == 3


def test_when_all_is_right_no_mistakes_are_shown(tmp_path: Path) -> None:
    page = make(tmp_path, PROBS[:2], (0, 0), NAMES).read_text("utf-8")
    assert "None was wrong." in page
    assert "<figcaption>" not in page


def test_a_file_that_is_gone_leaves_a_gap_only(tmp_path: Path) -> None:
    judged = Judged(
        [Sample("gone.png", tmp_path / "gone.png", 1)],
        torch.tensor([[0.9, 0.1]]),
        Classes((0, 1), ("a", "b")),
    )
    write_report(tmp_path / "report.html", "a run", {}, [], judged, "")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "file is gone" in page
    assert "gone.png" in page


def test_nothing_hostile_and_nothing_from_elsewhere_is_in_it(tmp_path: Path) -> None:
    names = (HOSTILE, "写真 🙂", "bird\" onload='x'")
    ids = [HOSTILE] * 4 + ["no utf-8 \udcff", "x" * 300]
    page = make(tmp_path, PROBS, LABELS, names, ids=ids).read_text("utf-8")
    read = Read(page)
    assert not {"script", "link", "iframe", "object", "base"} & set(read.tags)
    assert [value for name, value in read.attributes if name in ("href", "srcset", "action")] == []
    assert all(value.startswith("data:image/") for name, value in read.attributes if name == "src")
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    assert [row[0] for row in read.tables[1][1:]] == list(names)  # shown as what they are
    assert read.tags.count("style") == 1
    assert all(picture["alt"] for picture in read.pictures)


def browse(*options: str) -> str:
    """What Chromium prints, with no network to reach."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--allow-file-access-from-files"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The report is measured from outside, unchanged: its own policy lets no script run in it, and
# a window is never as narrow as a phone, but a frame is.
FRAME = """<!doctype html><body style="margin: 0"><iframe src="{page}" style="border: 0;
 width: {width}px; height: {height}px"></iframe><script>
onload = () => {{ const page = document.querySelector("iframe").contentDocument;
 const root = page.documentElement;
 const pictures = [...page.images].map(one => one.complete && one.naturalWidth > 0);
 const cut = [...page.querySelectorAll("img, p, h2, .box")].filter(
  one => one.getBoundingClientRect().right > root.clientWidth + 1).length;
 document.body.dataset.seen = JSON.stringify(
  {{width: innerWidth, client: root.clientWidth, scroll: root.scrollWidth, cut, pictures}}) }}
</script>"""

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine")


def frame(page: Path, width: int) -> Path:
    wrapper = page.with_name(f"frame{width}.html")
    wrapper.write_text(FRAME.format(page=page.as_uri(), width=width, height=1500), "utf-8")
    return wrapper


def look(page: Path, width: int) -> dict[str, object]:
    """What a browser makes of the page at that width, in pixels."""
    wrapper, profile = frame(page, width), page.parent / "profile"
    window = f"--window-size={max(width, 500)},1500"
    dom = browse(f"--user-data-dir={profile}", window, "--dump-dom", wrapper.as_uri())
    found = re.search('data-seen="(.*?)"', dom)
    assert found, dom
    seen: dict[str, object] = json.loads(unescape(found[1]))
    return seen


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A report with everything that is hard to show: many classes, long and hostile names."""
    probs, labels, names = many(17)
    names[3:5] = [HOSTILE * 3, "w" * 200]
    return make(tmp_path, probs, labels, names, ids=["i" * 200] * len(labels))


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(wide: Path, width: int) -> None:
    seen = look(wide, width)
    assert seen["pictures"] == [True] * (3 + 1 + 17)
    assert width - 20 <= seen["client"] <= width  # type: ignore[operator]
    assert seen["scroll"] == seen["client"]
    assert seen["cut"] == 0


@needs_chromium
def test_a_broken_picture_and_a_wide_line_would_be_seen(wide: Path) -> None:
    page = wide.read_text("utf-8")
    broken = re.sub("base64,.{40}", "base64,", page, count=1)
    broken = broken.replace("<h2>Result</h2>", "<h2 style='width: 900px'>Result</h2>")
    assert broken != page
    wide.write_text(broken, "utf-8")
    seen = look(wide, 360)
    assert seen["pictures"] == [False] + [True] * 20
    assert seen["scroll"] > seen["client"]  # type: ignore[operator]
    assert seen["cut"] == 1


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_paints_it(wide: Path, width: int) -> None:
    shot, window = wide.with_name("shot.png"), f"--window-size={max(width, 500)},1500"
    profile = f"--user-data-dir={wide.parent / 'profile'}"
    browse(profile, window, f"--screenshot={shot}", frame(wide, width).as_uri())
    with Image.open(shot) as image:
        painted = image.convert("RGB").crop((0, 0, width, 1400)).getcolors(2**24)
    assert painted is not None
    assert len(painted) > 100


@needs_chromium
def test_a_browser_prints_it(wide: Path) -> None:
    pdf = wide.with_name("report.pdf")
    browse(f"--user-data-dir={wide.parent / 'profile'}", f"--print-to-pdf={pdf}", wide.as_uri())
    assert len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) > 1
