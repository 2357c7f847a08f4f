"""Which settings count, and what they let through."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from portable_amp.migrate.findings import Finding
from portable_amp.migrate.rules import RULES
from portable_amp.migrate.settings import Settings, SettingsError, codes, load


def wanted(chosen: Settings, path: str = "a.py") -> set[str]:
    """The rules that are told of a file."""
    found = (Finding(path, 1, 1, 1, code, "info", "", {}, "advice") for code in RULES)
    return {one.code for one in found if chosen.wants(one)}


def having(folder: Path, text: str) -> Settings:
    """What is loaded where pyproject.toml has this table."""
    (folder / "pyproject.toml").write_text(f"[tool.portable-amp]\n{text}\n", "utf-8")
    return load(folder)


def beginning(*starts: str) -> set[str]:
    return {code for code in RULES if code.startswith(starts)}


ALL = {*RULES}
NO_1, NO_2 = ALL - beginning("PAM1"), ALL - beginning("PAM2")


def test_without_settings_everything_is_told(tmp_path: Path) -> None:
    assert wanted(Settings()) == wanted(load(tmp_path)) == ALL
    assert wanted(having(tmp_path, "")) == ALL


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('select = ["PAM2", "PAM501"]', beginning("PAM2", "PAM501")),
        ('ignore = ["PAM2", "PAM501"]', ALL - beginning("PAM2", "PAM501")),
        ('select = ["PAM2"]\nignore = ["PAM201"]', beginning("PAM2") - {"PAM201"}),
        ('select = ["PAM201"]\nignore = ["PAM2"]', set()),
        ('per-file-ignores = {"*.py" = ["PAM2"], "a*" = ["PAM3"]}', NO_2 - beginning("PAM3")),
        ('ignore = ["PAM1"]\nper-file-ignores = {"a.py" = ["PAM2"]}', NO_1 & NO_2),
        ('per-file-ignores = {"b.py" = ["PAM2"]}', ALL),
    ],
)  # fmt: skip
def test_what_is_selected_and_not_ignored_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: set[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wanted(having(tmp_path, text)) == told


def test_what_is_excluded(tmp_path: Path) -> None:
    assert having(tmp_path, 'exclude = ["a", "b/*"]').exclude == ("a", "b/*")


def test_patterns_are_of_the_folder_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pkg").mkdir()
    chosen = having(tmp_path, 'per-file-ignores = {"pkg/*" = ["PAM"]}')
    monkeypatch.chdir(tmp_path / "pkg")
    inside = ("a.py", "a.ipynb:cell 4", str(tmp_path / "pkg" / "a.py"), "../pkg/a.py")
    assert [wanted(chosen, path) for path in inside] == [set()] * 4
    outside = ("../a.py", "../a.ipynb:cell 4", str(tmp_path.parent / "a.py"))
    assert [wanted(chosen, path) for path in outside] == [ALL] * 3


def test_the_nearest_table_counts(tmp_path: Path) -> None:
    deep = tmp_path / "one" / "two"
    deep.mkdir(parents=True)
    outer = having(tmp_path, 'ignore = ["PAM1"]')
    (tmp_path / "one" / "pyproject.toml").write_text("[project]\n", "utf-8")
    assert load(deep) == load(tmp_path / "one") == outer
    (deep / "pyproject.toml").write_text("[tool.other]\n", "utf-8")
    assert load(deep) == outer
    assert having(deep, 'ignore = ["PAM2"]').ignore == load(deep).ignore == ("PAM2",)
    assert load(tmp_path / "one") == outer
    assert having(deep, "") == Settings(root=deep)


@pytest.mark.parametrize(
    "text",
    [
        *("selct = []", "x =", "select = 1", 'select = "PAM1"', "select = [1]", "ignore = {}"),
        *('select = [""]', 'select = ["PAM1", "X"]', 'ignore = ["PAM9"]', 'ignore = ["PAM1011"]'),
        *('exclude = "a"', "exclude = [[]]", "per-file-ignores = []", "per-file-ignores = 1"),
        *('per-file-ignores = {"a" = "PAM1"}', 'per-file-ignores = {"a" = ["X"]}'),
        *("per-file-ignores = {a = [1]}", 'select = ["PAM1"]\nother = 1'),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"^.*pyproject\.toml.*$"):
        having(tmp_path, text)


@pytest.mark.parametrize(
    "data", [b"[tool]\nportable-amp = 1", b"[tool]\nportable-amp = []", b"\xff"]
)
def test_what_is_no_table_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "pyproject.toml").write_bytes(data)
    with pytest.raises(SettingsError, match=r"pyproject\.toml"):
        load(tmp_path)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, encoding: str) -> str:
        raise PermissionError("not yours")

    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SettingsError, match="not yours"):
        load(tmp_path)


def test_codes() -> None:
    assert codes(["PAM1", "PAM203"], "") == ("PAM1", "PAM203")
    for wrong in ("", "X", "PAM9", "pam1"):
        with pytest.raises(SettingsError, match=r"--select: .* is no rule"):
            codes(["PAM1", wrong], "--select")


# Python has had a reader of its own since 3.11.
@pytest.mark.parametrize(
    ("version", "reader"), [((3, 10, 14), "tomli"), ((3, 11, 0), "tomllib"), ((4, 0, 0), "tomllib")]
)
def test_who_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...], reader: str
) -> None:
    (tmp_path / "pyproject.toml").touch()
    asked = []
    for name in ("tomli", "tomllib"):
        monkeypatch.setitem(sys.modules, name, None)
    found = SimpleNamespace(loads=lambda text: asked.append(text) or {})
    with monkeypatch.context() as there:
        there.setattr(sys, "version_info", version)
        there.setitem(sys.modules, reader, found)
        assert load(tmp_path).ignore == ()
        assert asked[0] == ""  # of the nearest, which has no table
    with monkeypatch.context() as there:
        there.setattr(sys, "version_info", (3, 10, 14))
        with pytest.raises(SettingsError, match="pip install tomli"):
            load(tmp_path)
