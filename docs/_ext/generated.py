"""Tables that are made from the code while the pages are built, so that they cannot be stale."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, get_args

from docutils import nodes
from pages import table
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cv_classification import config
from portable_amp.migrate.rules import RULES
from portable_amp.traps import TRAPS


class Traps(SphinxDirective):
    """What the doctor warns of."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = [
            [", ".join(trap.device_types) or "all", trap.what, trap.cure, trap.source]
            for trap in TRAPS
        ]
        return self.parse_text_to_nodes(table(["device", "what happens", "cure", "source"], rows))


class Rules(SphinxDirective):
    """All that `portable-amp check` tells."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = [
            [f"[{one.code}](#{one.code.lower()})", one.title, one.level, one.fix]
            for one in RULES.values()
        ]
        return self.parse_text_to_nodes(table(["code", "finds", "level", "fix"], rows))


class Rule(SphinxDirective):
    """One rule: what it finds, and what that does on which platform."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Its line and its table."""
        rule = RULES[self.arguments[0]]
        line = f"**{rule.title}** · {rule.level} · fix: {rule.fix}\n\n"
        platforms = rule.platforms
        return self.parse_text_to_nodes(line + table([*platforms], [[*platforms.values()]]))


class Settings(SphinxDirective):
    """Every setting of the example: from its model, with the page's words where it has none.

    The content has a line `section.key: meaning` for each key without a docstring.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The table; a key that nobody explains, or that is gone, is a warning."""
        words = dict(line.split(": ", 1) for line in self.content if line.strip())
        rows = []
        for key, kind, default, told in settings(config.Config):
            # What the page says wins: it may say more than the model's own line does.
            meaning = words.pop(key, told)
            if not meaning:
                self.warn(f"the setting {key!r} has no meaning")
            rows.append([f"`{key}`", kind, f"`{default}`", meaning])
        for key in words:
            self.warn(f"there is no setting {key!r} any more")
        return self.parse_text_to_nodes(table(["key", "value", "default", "meaning"], rows))

    def warn(self, text: str) -> None:
        """Say it as a build warning, which is an error."""
        self.state_machine.reporter.warning(text, line=self.lineno)


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every key of a model and its sections: name, what values it takes, default, docstring."""
    told = docstrings(model)
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
            continue
        shown = "null" if field.default is None else field.default
        if isinstance(shown, bool):
            shown = str(shown).lower()
        yield prefix + name, values_of(field.annotation, field.metadata), str(shown), told[name]


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each attribute in the source; empty where there is none."""
    (found,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(found, ast.ClassDef)
    told: dict[str, str] = {}
    for before, after in zip([*found.body], [*found.body[1:], ast.Pass()], strict=True):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            told[before.target.id] = after.value.value if text else ""  # type: ignore[attr-defined]
    return told


def values_of(annotation: Any, metadata: Sequence[Any]) -> str:
    """What a setting takes, in words."""
    plain = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true, false",
        Any: "see right",
    }
    if annotation in plain:
        kind = plain[annotation]
    elif isinstance(annotation, type) and issubclass(annotation, PurePath):
        kind = "path"
    else:
        parts = get_args(annotation)
        if not parts:  # one value of a Literal
            return "null" if annotation is type(None) else f"`{annotation}`"
        # Annotated keeps its bounds behind the type.
        extra = getattr(annotation, "__metadata__", None)
        kind = values_of(parts[0], extra) if extra else ", ".join(values_of(p, ()) for p in parts)
    bounds = {
        sign: getattr(bound, name)
        for given in metadata
        for bound in getattr(given, "metadata", None) or [given]
        for name, sign in {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}.items()
        if getattr(bound, name, None) not in (None, 2**32)  # as good as none
    }
    if ">" in bounds:
        bounds.pop("≥", None)
    told = ", ".join(f"{sign} {bound}" for sign, bound in sorted(bounds.items(), reverse=True))
    return f"{kind} {told}".strip()


HELD: dict[str, list[str]] = {}


def hold(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Hide an attribute's docstring from napoleon, which takes `Words: more words` for a type."""
    if what in ("attribute", "property"):
        HELD[name] = lines[:]
        lines.clear()


def release(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put it back, behind napoleon."""
    lines[:] = HELD.pop(name, lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the tables."""
    app.connect("autodoc-process-docstring", hold, priority=400)
    app.connect("autodoc-process-docstring", release, priority=600)
    for directive in (Traps, Rules, Rule, Settings):
        app.add_directive(directive.__name__.lower(), directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
