"""The page of the rules: every rule has a section, and each example is found, fixed and clean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from portable_amp.migrate import commands, fixer, output, rules, scan

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reference" / "rules.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (PAM\d+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


class Example(NamedTuple):
    """One section's code."""

    before: str
    how: str
    """`fix`, `fix --unsafe-fixes`, or `by hand`."""
    after: str


def example(section: str) -> Example:
    before, after = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    found = re.search(r"^After,? `?(fix|fix --unsafe-fixes|by hand)`?:$", section, re.M)
    assert found
    return Example(before, found[1], after)


def codes(text: str) -> set[str]:
    return {one.code for one in scan.scan(text)}


def test_every_rule_has_a_section() -> None:
    assert list(SECTIONS) == sorted(rules.RULES)
    assert re.findall(r"^```\{rule\} (\w+)$", PAGE, re.M) == list(SECTIONS)


@pytest.mark.parametrize("code", SECTIONS)
def test_the_example_shows_the_rule(code: str) -> None:
    shown = example(SECTIONS[code])
    assert codes(shown.before) == {code}
    assert codes(shown.after) == set()


@pytest.mark.parametrize("code", SECTIONS)
def test_the_example_is_what_fix_makes(code: str) -> None:
    before, how, after = example(SECTIONS[code])
    found = scan.scan(before)
    safe, unsafe = (fixer.apply(before, found, unsafe=flag) for flag in (False, True))
    assert (safe == after) is (how == "fix")
    assert (unsafe == after) is (how != "by hand")
    assert (unsafe == before) is (how == "by hand")


def test_the_how_to_shows_what_is_found_and_made() -> None:
    page = (DOCS / "how-to" / "fix-a-cuda-script.md").read_text("utf-8")
    blocks = re.findall(r"^```(python|text|diff)\n(.*?)^```$", page, re.M | re.S)
    (_, before), (_, told), (_, diff), (_, after), *_ = blocks
    found = scan.scan(before, "train.py")
    assert output.as_text(found) == told
    assert fixer.apply(before, found) == after
    assert commands._diff(before, after, "train.py") == diff
