"""From text to findings."""

from __future__ import annotations

import re

from portable_amp.migrate.detect import detect
from portable_amp.migrate.findings import Finding
from portable_amp.migrate.rewrite import Rewriter
from portable_amp.migrate.rules import RULES

RELEVANT = re.compile(
    r"cuda|CUDA|nccl|apex|autocast|GradScaler|pin_memory|torch\.load|DataParallel|\bload\("
    r"|fp32_precision"
)


def relevant(text: str) -> bool:
    """Whether there can be anything in a text; cheap, and never wrongly no."""
    return bool(RELEVANT.search(text))


def scan(text: str, path: str = "<stdin>") -> list[Finding]:
    r"""What is tied to CUDA in a text, in its order.

    Raises:
        SyntaxError: it is not Python.

    >>> [(one.line, one.code) for one in scan("import torch\nx = torch.ones(2).cuda()")]
    [(2, 'PAM201')]
    """
    if not relevant(text):
        return []
    try:
        return _findings(text, path)
    except RecursionError:
        raise SyntaxError("nested too deeply") from None


def _findings(text: str, path: str) -> list[Finding]:
    found = detect(text)
    rewriter = Rewriter(found)
    findings = []
    for match in found.matches:
        fix = rewriter.fix(match)
        findings.append(
            Finding(
                path,
                match.node.lineno,
                found.source.column(match.node),
                match.node.end_lineno or match.node.lineno,
                match.code,
                match.level,
                f"{RULES[match.code].message} {fix.reason}".strip(),
                RULES[match.code].platforms,
                fix.how,
                fix.edits,
                fix.imports,
                rewriter.computes.precision if fix.context else "",
            )
        )
    return findings
