from __future__ import annotations

import logging
import warnings

import pytest

from portable_amp import PrecisionFallbackWarning, notices


def test_a_notice_is_given_once_for_each_subject(caplog: pytest.LogCaptureFixture) -> None:
    for key in ("a", "b", "a"):
        notices.tell_once(key, f"about {key}")
    assert caplog.record_tuples == [
        ("portable_amp", logging.WARNING, "about a"),
        ("portable_amp", logging.WARNING, "about b"),
    ]
    notices.forget()
    notices.tell_once("a", "about a")
    assert len(caplog.records) == 3


def test_a_warning_of_a_class_is_no_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(PrecisionFallbackWarning, match="changed") as caught:
        notices.tell_once("a", "changed", PrecisionFallbackWarning)
        notices.tell_once("a", "changed", PrecisionFallbackWarning)
    assert len(caught) == 1
    assert not caplog.records


def test_a_warning_blames_the_line_of_the_program() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notices.tell_once("a", "told", UserWarning)
        notices.tell("told", UserWarning)
    assert [warning.filename for warning in caught] == [__file__] * 2


def test_other_ranks_are_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    notices.tell_once("a", "told")
    notices.tell("told", UserWarning)  # an error, were it given
    monkeypatch.setenv("RANK", "0")
    notices.tell("by the first")
    assert [record.message for record in caplog.records] == ["by the first"]
