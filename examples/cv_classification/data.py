"""Which images there are and what they show: CSV tables, or one folder per class."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from sklearn.model_selection import StratifiedKFold, train_test_split

from cv_classification.config import DataConfig, InputError, own_stream
from cv_classification.lock import sweep
from cv_classification.parallel import tell
from cv_classification.plain import brief
from portable_amp.checkpoint import replacing

COLUMNS = ("ID", "target")
# What is taken for a picture; whether it can be decoded is seen when all are tried.
SUFFIXES = {
    *(".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    # Hardly; but not to be passed over either.
    *(".arw", ".cr2", ".cr3", ".dng", ".eps", ".heic", ".heif", ".jxl", ".nef", ".orf", ".pdf"),
    *(".psd", ".raf", ".raw", ".rw2", ".svg"),
}


class Sample(NamedTuple):
    """One image, and the index of its class; -1 where the class is not known."""

    id: str
    path: Path
    label: int = -1


class Classes(NamedTuple):
    """What can be told apart: label `i` is written as `targets[i]` and called `names[i]`."""

    targets: tuple[int, ...]
    names: tuple[str, ...]


def read_labelled(
    path: Path, images: Path | None = None, known: Classes | None = None
) -> tuple[list[Sample], Classes]:
    """The labelled images of a folder (train.csv and train/, or a folder per class), or of a CSV.

    `images` is the folder of the images that a CSV names, `train` beside it unless told; `known`
    are the classes of a trained model, which no image may leave.

    Raises:
        InputError: it is none of these, or its tables contradict themselves.
    """
    table = path / "train.csv" if path.is_dir() else path
    if table.is_file():
        return _read_table(table, images or table.parent / "train", known)
    if not path.is_dir():
        raise InputError(f"there is no data folder or table {str(path)!r}")
    return _read_folders(path, known)


def read_unlabelled(path: Path) -> list[Sample]:
    """The images to predict: those of sample_submission.csv, in test/, else all in the folder.

    Raises:
        InputError: there are none, or the table is wrong.
    """
    table = path / "sample_submission.csv"
    if table.is_file():
        return [Sample(name, path / "test" / name) for name, _ in read_rows(table)]
    found, _, others = _look(path, deep=True)
    if not found:
        raise InputError(f"{str(path)!r} has neither a sample_submission.csv nor images")
    _tell_passed(others)
    samples = [Sample(file.relative_to(path).as_posix(), file) for file in found]
    for sample in samples:
        if _climbs(sample.id):
            raise InputError(f"{str(path)!r}: a submission cannot hold the name {brief(sample.id)}")
    return samples


def read_rows(table: Path) -> list[tuple[str, int]]:
    """The (ID, target) rows of a table, in order.

    Raises:
        InputError: columns, IDs or targets are missing, twice, or not what they should be.
    """
    rows: dict[PurePosixPath, tuple[str, int]] = {}
    for where, name, target in _read_columns(table, *COLUMNS):
        if _climbs(name):
            raise InputError(f"{where}: the ID {brief(name)} is not a path inside the image folder")
        file = PurePosixPath(name)  # which "./a.png" is as well as "a.png"
        if file in rows:
            raise InputError(f"{where}: the ID {brief(name)} is there twice")
        rows[file] = name, _whole(target, where)
    if not rows:
        raise InputError(f"{table} has no rows")
    return list(rows.values())


def split(
    samples: Sequence[Sample], classes: Classes, config: DataConfig, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """The samples for training and for validation, each with every class in proportion.

    Raises:
        InputError: there are too few classes or images for that.
    """
    counts = Counter(sample.label for sample in samples)
    rarest = min(counts, key=lambda label: counts[label])
    if len(counts) < 2:
        raise InputError(f"all images are of class {classes.names[rarest]!r}; two classes work")
    if counts[rarest] < (needed := config.folds or 2):
        raise InputError(
            f"class {classes.names[rarest]!r} has {counts[rarest]} images; {needed} work, so that "
            "there is one to train with and one to validate with"
        )
    labels = [sample.label for sample in samples]
    if config.folds is not None and config.fold is not None:
        folds = StratifiedKFold(config.folds, shuffle=True, random_state=seed)
        parts = [*folds.split(labels, labels)][config.fold]
    else:
        every = range(len(samples))
        try:
            parts = train_test_split(
                every, test_size=config.validation, random_state=seed, stratify=labels
            )
        except ValueError as error:
            raise InputError(
                f"data.validation={config.validation}: {len(samples)} images in {len(counts)} "
                f"classes cannot be divided so that either part has every class: {error}"
            ) from error
    train, held_out = ([samples[index] for index in part] for part in parts)
    return train, held_out


def write_text(path: Path, text: str, check: Callable[[Path], None] | None = None) -> None:
    """Write a file so that `path` holds what it held before, or all of the new text.

    `check` sees the written file before it takes its place, and raises to stop that. A device, a
    pipe, and this program's own output, such as /dev/stdout, are written to as they are.
    """
    if stream := own_stream(path):
        print(text, end="", file=stream)
    elif path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8", newline="")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8", newline="")
            if check:
                check(new)


def write_table(
    path: Path,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a CSV table as `write_text` does."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue(), check)


def _read_table(table: Path, images: Path, known: Classes | None) -> tuple[list[Sample], Classes]:
    rows = read_rows(table)
    meta = table.with_name("meta.csv")
    classes = known or (_read_meta(meta) if meta.is_file() else _numbered(rows))
    labels = {target: label for label, target in enumerate(classes.targets)}
    for name, target in rows:
        if target not in labels:
            of = "the trained model" if known else str(meta)
            raise InputError(f"{table}: the target {target} of {name!r} is no class of {of}")
    return [Sample(name, images / name, labels[target]) for name, target in rows], classes


def _read_meta(meta: Path) -> Classes:
    names: dict[int, str] = {}
    for where, target, name in _read_columns(meta, "target", "class_name"):
        if _whole(target, where) in names:
            raise InputError(f"{where}: the target {target} is there twice")
        names[_whole(target, where)] = name
    return Classes(tuple(sorted(names)), tuple(names[target] for target in sorted(names)))


def _numbered(rows: Sequence[tuple[str, int]]) -> Classes:
    targets = tuple(sorted({target for _, target in rows}))
    return Classes(targets, tuple(map(str, targets)))


def _read_folders(path: Path, known: Classes | None) -> tuple[list[Sample], Classes]:
    stray, folders, others = _look(path)
    if not folders:
        raise InputError(f"{str(path)!r} has neither a train.csv nor a folder per class")
    names = known.names if known else tuple(folder.name for folder in folders)
    samples = []
    for folder in folders:
        files, deeper, more = _look(folder)
        if names.count(folder.name) != 1:
            raise InputError(f"{str(folder)!r} is no class of the trained model, or two")
        if deeper:
            raise InputError(f"the class folder {str(folder)!r} has a folder in it: {deeper[0]}")
        if not files:
            raise InputError(f"the class folder {str(folder)!r} has no images")
        label = names.index(folder.name)
        samples += [Sample(f"{folder.name}/{file.name}", file, label) for file in files]
        others += more
    _tell_passed(stray + others)
    return samples, known or Classes(tuple(range(len(names))), names)


def _look(folder: Path, *, deep: bool = False) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures, folders, and what is neither; `deep`: of all folders in it, but for links."""
    pictures: list[Path] = []
    folders: list[Path] = []
    others: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == "__MACOSX":  # which zip files of a Mac have
            others.append(entry)
        elif entry.is_dir():
            folders.append(entry)
        else:
            (pictures if entry.suffix.lower() in SUFFIXES else others).append(entry)
    for inner in folders if deep else ():
        if inner.is_symlink():  # it may lead back here
            others.append(inner)
            continue
        found, _, more = _look(inner, deep=True)
        pictures, others = pictures + found, others + more
    return sorted(pictures), folders, others


def _tell_passed(files: Sequence[Path]) -> None:
    """Name what is in a folder of images, and is not used."""
    if files:
        named = ", ".join(map(str, files[:3]))
        tell(f"passed over {len(files)} that are no images: {named}{', ...' * (len(files) > 3)}")


def _read_columns(table: Path, first: str, second: str) -> list[tuple[str, str, str]]:
    """Two columns of a table, each row after the place where it stands."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = next(reader, [])
            for column in (first, second):
                if column not in columns:
                    raise InputError(f"{table} has no column {column!r}, only {brief(columns)}")
                if columns.count(column) > 1:
                    raise InputError(f"{table} has the column {column!r} twice")
            rows = []
            for row in filter(None, reader):  # empty lines are none
                where = f"{table}, line {reader.line_num}"
                if len(row) != len(columns):
                    raise InputError(
                        f"{where} has {len(row)} fields, not {len(columns)}; a text with a comma "
                        "in it stands in quotation marks"
                    )
                rows.append((where, row[columns.index(first)], row[columns.index(second)]))
            return rows
    except OSError as error:
        raise InputError(f"cannot read {str(table)!r}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{table} is not a CSV table in UTF-8: {error}") from error


def _whole(text: str, where: str) -> int:
    if not re.fullmatch(r"[ \t]*[-+]?[0-9]{1,18}[ \t]*", text):
        raise InputError(f"{where}: the target {brief(text)} is not a whole number")
    return int(text)


def _climbs(name: str) -> bool:
    """Whether an ID names no file of its folder, on whichever system, or is no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    if not name or "\0" in name:
        return True
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)
