"""`[tool.portable-amp]` in pyproject.toml, and what the command line puts on top."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portable_amp.migrate.files import excluded
from portable_amp.migrate.findings import Finding
from portable_amp.migrate.rules import RULES


class SettingsError(ValueError):
    """A setting cannot be used; the message is one line."""


@dataclass
class Settings:
    """What is told of the findings; codes may be cut short: PAM3 is all of PAM301 to PAM307."""

    select: tuple[str, ...] = ("PAM",)
    ignore: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    per_file: dict[str, tuple[str, ...]] = field(default_factory=dict)
    root: Path = Path()

    def wants(self, finding: Finding) -> bool:
        """Whether a finding is to be told."""
        path = Path(finding.path.partition(":cell ")[0])
        with contextlib.suppress(ValueError):
            path = path.resolve().relative_to(self.root.resolve())
        ignored = [*self.ignore]
        for pattern, codes in self.per_file.items():
            ignored += codes if excluded(path, [pattern]) else ()
        return finding.code.startswith(self.select) and not finding.code.startswith(tuple(ignored))


def load(start: Path) -> Settings:
    """The settings of the nearest pyproject.toml at or above a path that has any.

    Raises:
        SettingsError: they cannot be read, or are not understood.
    """
    folder = start.resolve()
    for place in (folder, *folder.parents):
        path = place / "pyproject.toml"
        if not path.is_file():
            continue
        table = _read(path).get("tool", {}).get("portable-amp")
        if table is not None:
            return _check(table, path)
    return Settings()


def codes(given: Sequence[str], where: str) -> tuple[str, ...]:
    """Codes, or beginnings of codes, that there are.

    Raises:
        SettingsError: one is not.
    """
    for code in given:
        if not code or not any(known.startswith(code) for known in RULES):
            raise SettingsError(f"{where}: {code!r} is no rule; there are {', '.join(RULES)}")
    return tuple(given)


def _read(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib as toml
    else:
        try:
            import tomli as toml
        except ImportError:
            raise SettingsError(f"{path} needs tomli on Python 3.10: pip install tomli") from None
    try:
        return toml.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error


def _check(table: Any, path: Path) -> Settings:
    where = f"{path} [tool.portable-amp]"
    if not isinstance(table, dict):
        raise SettingsError(f"{where} is no table")
    found = Settings(root=path.parent)
    for key, value in table.items():
        if key == "per-file-ignores":
            if not isinstance(value, dict):
                raise SettingsError(f"{where}: {key} is no table of patterns and codes")
            found.per_file = {
                name: codes(_words(listed, f"{where}: {key}.{name!r}"), f"{where}: {key}")
                for name, listed in value.items()
            }
        elif key in ("select", "ignore"):
            setattr(found, key, codes(_words(value, f"{where}: {key}"), f"{where}: {key}"))
        elif key == "exclude":
            found.exclude = _words(value, f"{where}: {key}")
        else:
            known = "select, ignore, exclude, per-file-ignores"
            raise SettingsError(f"{where}: there is no setting {key!r}; there are {known}")
    return found


def _words(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise SettingsError(f"{where} is no list of strings")
    return tuple(value)
