"""The formats, as those read them who take them: a SARIF viewer, GitHub, a reader of Markdown."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portable_amp.migrate import output
from portable_amp.migrate.findings import Finding
from portable_amp.migrate.rules import RULES
from portable_amp.migrate.scan import scan

# Of SARIF 2.1.0, "level" of a result; and GitHub's workflow commands.
LEVELS = {
    "error": ("error", "error"),
    "warning": ("warning", "warning"),
    "info": ("note", "notice"),
}


def of(code: str, path: str = "a.py", line: int = 1) -> Finding:
    """A finding of a rule."""
    rule = RULES[code]
    return Finding(path, line, 1, line, code, rule.level, rule.message, rule.platforms, rule.fix)


ALL = [of(code, path, 2) for path in ("a.py", "b.py") for code in RULES]


def test_there_are_the_formats_that_the_documents_name() -> None:
    assert set(output.FORMATS) == {"text", "json", "sarif", "github", "markdown"}
    texts = {form(ALL) for form in output.FORMATS.values()}
    assert len(texts) == len(output.FORMATS)


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_has_the_name_that_it_has_there(level: str) -> None:
    one = of("PAM201")._replace(level=level)  # type: ignore[arg-type]
    (run,) = json.loads(output.as_sarif([one]))["runs"]
    command = re.match(r"::(\w+) ", output.as_github([one]))
    assert command
    assert (run["results"][0]["level"], command[1]) == LEVELS[level]
    assert f"1 places: {', '.join(f'{int(n == level)} {n}' for n in LEVELS)}." in (
        output.as_markdown([one])
    )


def test_sarif_is_what_its_standard_asks_for() -> None:
    log = json.loads(output.as_sarif(ALL))
    assert log["version"] == "2.1.0"
    assert re.fullmatch(r"https://\S+/sarif-2\.1\.0\.json", log["$schema"])
    (run,) = log["runs"]
    assert run["columnKind"] == "unicodeCodePoints"  # and not in UTF-16, as is meant without it
    driver = run["tool"]["driver"]
    assert driver["name"] == "portable-amp"
    for rule, (code, known) in zip(driver["rules"], RULES.items(), strict=True):
        assert rule["id"] == code
        assert rule["shortDescription"] == {"text": known.title}
        assert rule["fullDescription"] == {"text": known.message}
        assert rule["defaultConfiguration"] == {"level": LEVELS[known.level][0]}
    for one, result in zip(ALL, run["results"], strict=True):
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == one.code
        assert result["message"] == {"text": one.message}
        assert result["level"] == LEVELS[one.level][0]


def test_a_sarif_column_counts_code_points() -> None:
    text = "import torch\n'\U0001f600', x.cuda()\n"
    (result,) = json.loads(output.as_sarif(scan(text)))["runs"][0]["results"]
    column = result["locations"][0]["physicalLocation"]["region"]["startColumn"]
    assert text.split("\n")[1][column - 1 :] == "x.cuda()"


@pytest.mark.parametrize(
    ("path", "uri"),
    [("a b,\u00fc.py", "a%20b%2C%C3%BC.py"), ("a\\b.py", "a/b.py"), ("n.ipynb:cell 3", "n.ipynb")],
)
def test_a_sarif_path_is_a_uri_of_the_file(path: str, uri: str) -> None:
    (result,) = json.loads(output.as_sarif([of("PAM201", path)]))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"] == {"uri": uri}


def test_the_lists_are_whole() -> None:
    assert output.as_text(ALL).splitlines() == [
        f"{one.path}:2:1: {one.code} {one.message}" for one in ALL
    ]
    assert [one["code"] for one in json.loads(output.as_json(ALL))] == [one.code for one in ALL]
    commands = output.as_github(ALL).splitlines()
    assert len(commands) == len(ALL)
    assert all(line.startswith("::") for line in commands)
    assert all(form(ALL).endswith("\n") for form in output.FORMATS.values())


def test_the_report_has_all_platforms_of_all_places() -> None:
    title, counts, *blocks = output.as_markdown(ALL).rstrip("\n").split("\n\n")
    assert title.startswith("# ")
    numbers = [int(word) for word in re.findall(r"\d+", counts)]
    assert numbers[0] == len(ALL) == sum(numbers[1:])
    for path in ("a.py", "b.py"):
        heading, table, said = (blocks.pop(0) for _ in range(3))
        assert heading == f"## {path}"
        head, rule, *rows = (
            [cell.strip() for cell in row.split("|")[1:-1]] for row in table.split("\n")
        )
        assert head == ["Line", "Code", "Level", *RULES["PAM201"].platforms]
        assert len(rule) == len(head)
        assert set("".join(rule)) == {"-", ":"}
        assert rows == [
            ["2", code, known.level, *known.platforms.values()] for code, known in RULES.items()
        ]
        assert [line.split("**")[1] for line in said.split("\n")] == sorted(RULES)
    assert not blocks
    assert output.as_markdown([]) != output.as_markdown(ALL[:1])


@given(st.text("\\|*_<a ", min_size=1))
def test_what_markdown_would_take_for_its_own_is_escaped(text: str) -> None:
    report = output.as_markdown([of("PAM201", text)])
    heading = report.split("\n")[4].removeprefix("## ")
    assert not set(re.sub(r"\\.", "", heading)) & set("\\|*_<")
    assert re.sub(r"\\(.)", r"\1", heading) == text
