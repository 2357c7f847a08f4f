from __future__ import annotations

import pytest

from portable_amp.errors import shown


@pytest.mark.parametrize("size", range(70, 90))
def test_what_is_shown_is_whole_up_to_80_characters(size: int) -> None:
    text = "x" * size
    told, whole = shown(text), repr(text)
    assert told == whole if len(whole) <= 80 else len(told) == 80
    assert told.removesuffix("...") in whole
    assert (told == whole) is not told.endswith("...")


def test_what_is_shown_is_one_line() -> None:
    class Odd:
        def __repr__(self) -> str:
            return "a\n   b\tc"

    assert shown(Odd()) == "a b c"
