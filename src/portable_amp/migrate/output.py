"""Findings as text, JSON, SARIF, GitHub annotations, and a report to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import get_args

from portable_amp.migrate.findings import Finding, Level
from portable_amp.migrate.rules import RULES

PLATFORMS = ("CUDA", "ROCm", "MPS", "XPU", "CPU")


def as_text(findings: Sequence[Finding]) -> str:
    """A line for each: path:line:column: code message."""
    return "".join(f"{f.path}:{f.line}:{f.column}: {f.code} {f.message}\n" for f in findings)


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects."""
    keys = ("path", "line", "column", "end_line", "code", "level", "message", "platforms", "fix")
    listed = [{key: getattr(one, key) for key in keys} for one in findings]
    return json.dumps(listed, indent=2) + "\n"


def as_sarif(findings: Sequence[Finding]) -> str:
    """SARIF 2.1.0, which code hosts show beside the code."""
    level = {"error": "error", "warning": "warning", "info": "note"}
    rules = [
        {
            "id": code,
            "shortDescription": {"text": rule.title},
            "fullDescription": {"text": rule.message},
            "defaultConfiguration": {"level": level[rule.level]},
        }
        for code, rule in RULES.items()
    ]
    results = [
        {
            "ruleId": one.code,
            "ruleIndex": list(RULES).index(one.code),
            "level": level[one.level],
            "message": {"text": one.message},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": _uri(one.path)},
                        "region": {
                            "startLine": one.line,
                            "startColumn": one.column,
                            "endLine": one.end_line,
                        },
                    }
                }
            ],
        }
        for one in findings
    ]
    driver = {"name": "portable-amp", "rules": rules}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def as_github(findings: Sequence[Finding]) -> str:
    """Workflow commands, which GitHub shows as annotations."""
    level = {"error": "error", "warning": "warning", "info": "notice"}

    def escape(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    lines = []
    for one in findings:
        path = escape(one.path).replace(":", "%3A").replace(",", "%2C")
        place = f"file={path},line={one.line},endLine={one.end_line},col={one.column}"
        lines.append(f"::{level[one.level]} {place},title={one.code}::{escape(one.message)}\n")
    return "".join(lines)


def as_markdown(findings: Sequence[Finding]) -> str:
    """The report on platforms: per file what breaks where, and what to write instead."""
    if not findings:
        return "# Platform report\n\nNothing is tied to CUDA.\n"
    lines = ["# Platform report", ""]
    counts = [f"{sum(f.level == level for f in findings)} {level}" for level in get_args(Level)]
    lines += [f"{len(findings)} places: {', '.join(counts)}.", ""]
    for path, group in groupby(findings, key=lambda one: one.path):
        lines += [f"## {_cell(path)}", "", f"| Line | Code | Level | {' | '.join(PLATFORMS)} |"]
        lines.append("| ---: | --- | --- " + "| --- " * len(PLATFORMS) + "|")
        seen = {}
        for one in group:
            seen[one.code] = one.message
            effects = " | ".join(_cell(one.platforms[name]) for name in PLATFORMS)
            lines.append(f"| {one.line} | {one.code} | {one.level} | {effects} |")
        lines += ["", *(f"- **{code}**: {_cell(text)}" for code, text in sorted(seen.items())), ""]
    return "\n".join(lines)


FORMATS: dict[str, Callable[[Sequence[Finding]], str]] = {
    "text": as_text,
    "json": as_json,
    "sarif": as_sarif,
    "github": as_github,
    "markdown": as_markdown,
}


def _cell(text: str) -> str:
    for sign in ("\\", "|", "*", "_", "<"):
        text = text.replace(sign, "\\" + sign)
    return text


def _uri(path: str) -> str:
    from urllib.parse import quote

    return quote(path.partition(":cell ")[0].replace("\\", "/"))
