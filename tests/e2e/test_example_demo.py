"""The demo, run for real."""

from __future__ import annotations

from pathlib import Path

import pytest

import cv_classification.demo as writing
from cv_classification.__main__ import main
from cv_classification.config import InputError
from cv_classification.data import read_rows
from cv_classification.demo import score_submission, write_pictures
from demo_images.digits import digits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_demo_reaches_its_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    score = float(said[-1].rpartition(" ")[2])
    assert score >= 0.99
    data, submission = out / "data", out / "run1" / "submission.csv"
    assert score == pytest.approx(score_submission(submission, data / "answers.csv"), abs=1e-4)
    names = ("best.pt", "metrics.jsonl", "report.html", "submission.csv")
    for path in (data, *(out / "run1" / name for name in names)):
        assert path.exists()
        assert any(str(path) in line for line in said[-7:])
    plain = float(said[-2].removeprefix("macro F1 without views: "))
    without = score_submission(out / "run1/submission-without-tta.csv", data / "answers.csv")
    assert plain == pytest.approx(without, abs=1e-4)

    sample = [name for name, _ in read_rows(data / "sample_submission.csv")]
    assert [name for name, _ in read_rows(submission)] == sample
    learned = {name for name, _ in read_rows(data / "train.csv")}
    assert len(learned) + len(sample) == 1797
    assert not learned & set(sample)
    assert {path.name for path in (data / "train").iterdir()} == learned
    assert dict(read_rows(data / "sample_submission.csv")) != dict(read_rows(data / "answers.csv"))

    # Twice: the data stays, the run gets the next number, and what misses the mark says so.
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    short = ["train.epochs=1", "train.warmup_epochs=0", "data.batch_size=512"]
    assert main(["demo", "--out", str(out), "--seed", "1", *short]) == 1
    assert "That is below 0.99" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    assert sorted(path.name for path in out.iterdir()) == ["data", "run1", "run2"]

    answers = (data / "answers.csv").read_text()
    (data / "answers.csv").write_text(answers.replace("digit-", "other-", 1))
    with pytest.raises(InputError, match="different images"):
        score_submission(submission, data / "answers.csv")


def test_interrupted_data_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_table", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_pictures(tmp_path / "data", digits())
    assert list(tmp_path.iterdir()) == []
