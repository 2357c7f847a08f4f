"""What the fixer writes in place of a match: edits, and whether they are safe."""

from __future__ import annotations

import ast
from typing import NamedTuple

from portable_amp.migrate.detect import Found, Match
from portable_amp.migrate.findings import Applicability, Edit
from portable_amp.migrate.guards import is_device


class Fix(NamedTuple):
    """The edits of one place. `{ctx}` in them stands for the name of a context."""

    how: Applicability = "advice"
    edits: tuple[Edit, ...] = ()
    imports: tuple[str, ...] = ()
    context: bool = False


class Rewriter:
    """Fixes for the matches of one text."""

    def __init__(self, found: Found) -> None:
        self.source, self.scope = found.source, found.scope
        codes = {match.code for match in found.matches}
        # Which card a process has, or which of two devices, is then decided elsewhere.
        self.several = bool(codes & {"PAM306", "PAM401"})
        self.chosen = "PAM204" in codes
        self.names = {name for match in found.matches for name in match.scope.device_names()}

    def fix(self, match: Match) -> Fix:
        """How to rewrite a match; advice where that takes a person."""
        make = getattr(self, f"_{match.code.lower()}", None)
        if make is None or match.guarded:
            return Fix()
        fix: Fix = make(match)
        if match.decorator and fix.edits:
            fix = fix._replace(how="unsafe")
        return fix

    def _device(self, match: Match) -> tuple[str, bool, Applicability]:
        """An expression for the device, whether it takes a context, and how safe that is."""
        reach = match.scope.device_names()
        if len(reach) == 1 and not match.decorator and not match.parameter:
            (name,) = reach
            defines = _targets(match.statement)
            if name not in defines and self._is_set_before(name, match):
                return name, False, "safe"
        unsafe = self.several or self.chosen or bool(self.names - _targets(match.statement))
        return "{ctx}.device", True, "unsafe" if unsafe else "safe"

    def _is_set_before(self, name: str, match: Match) -> bool:
        scope = match.scope
        if name in scope.parameters:
            return True
        values = [one for one in scope.bound.get(name, ()) if isinstance(one, ast.expr)]
        if name in scope.bound:
            return any(one.lineno < match.node.lineno for one in values)
        return scope.parent is not None  # set further out, and used when a function runs

    def _put(self, match: Match, node: ast.expr, text: str | None = None) -> Fix:
        device, context, how = self._device(match)
        return Fix(how, (Edit(*self.source.span(node), text or device),), (), context)

    def _call(self, match: Match, name: str, first: str, moved: tuple[str, ...] = ()) -> Fix:
        """Rename a call, and hand it the device as `first` argument; `moved` get keywords."""
        node, (device, context, how) = match.node, self._device(match)
        if not isinstance(node, ast.Call) or any(isinstance(a, ast.Starred) for a in node.args):
            return Fix()
        edits = [Edit(*self.source.span(node.func), name)]
        keywords = {one.arg: one.value for one in node.keywords}
        given = keywords.get(first) if moved == () else None
        if moved == () and node.args and is_device(node.args[0]):
            given = node.args[0]
        if given is not None:
            if not _first_card(given):
                return Fix()
            edits.append(Edit(*self.source.span(given), device))
        else:
            text = self.source.text
            at = opening = text.index("(", self.source.span(node.func)[1]) + 1
            for argument, keyword in zip(node.args, moved, strict=False):
                at += len(text[at:]) - len(text[at:].lstrip())
                edits.append(Edit(at, at, f"{keyword}="))
                at = text.find(",", self.source.span(argument)[1]) + 1
            more = ", " if node.args or node.keywords else ""
            edits.append(Edit(opening, opening, device + more))
        return Fix(how, tuple(edits), (name,), context)

    def _pam101(self, match: Match) -> Fix:
        return self._call(
            match, "maybe_autocast", "device_type", ("enabled", "dtype", "cache_enabled")
        )

    def _pam102(self, match: Match) -> Fix:
        return self._call(match, "maybe_autocast", "device_type")

    def _pam103(self, match: Match) -> Fix:
        old = match.what.startswith("torch.cuda.amp")
        return self._call(match, "ScalerShim", "device", POSITIONAL if old else ())

    def _pam201(self, match: Match) -> Fix:
        call = match.node
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Attribute)
        keywords = {one.arg: one.value for one in call.keywords}
        which = call.args[0] if call.args else keywords.get("device")
        if which is not None and not (isinstance(which, ast.Constant) and which.value in (0, None)):
            return Fix()
        if "non_blocking" in keywords:
            return self._late(match, call)
        device, context, how = self._device(match)
        end = self.source.span(call.func)[1]
        edits = [Edit(end - len("cuda"), end, "to")]
        if which is not None:
            edits.append(Edit(*self.source.span(which), device))
        else:
            opening = self.source.text.index("(", end) + 1
            more = ", " if call.keywords else ""
            edits.append(Edit(opening, opening, device + more))
        return Fix(how, tuple(edits), (), context)

    def _pam202(self, match: Match) -> Fix:
        node = match.node
        assert isinstance(node, ast.expr)
        named = node
        if isinstance(node, ast.Call):
            if len(node.args) + len(node.keywords) != 1:
                return Fix()
            named = node.args[0] if node.args else node.keywords[0].value
        if not _first_card(named):
            return Fix()
        late = match.call and any(one.arg == "non_blocking" for one in match.call.keywords)
        return self._late(match, match.call) if match.call and late else self._put(match, node)

    def _late(self, match: Match, call: ast.Call) -> Fix:
        """Copies that nobody waits for: off CUDA the source may be gone, and ctx.to knows it."""
        assert isinstance(call.func, ast.Attribute)
        others = len(call.args) + len(call.keywords) - (call.func.attr == "to")
        _, context, how = self._device(match)
        if not context or others != 1:
            return Fix()
        start, end = self.source.span(call.func.value)
        edits = Edit(start, start, "{ctx}.to("), Edit(end, self.source.span(call)[1], ")")
        return Fix(how, edits, (), True)

    _pam501 = _pam202

    def _pam203(self, match: Match) -> Fix:
        assert isinstance(match.node, ast.expr)
        if not _first_card(match.node):
            return Fix()
        edit = Edit(*self.source.span(match.node), "str({ctx}.device)")
        return Fix("unsafe", (edit,), (), True)

    def _pam204(self, match: Match) -> Fix:
        if not isinstance(match.node, ast.IfExp) or "device(" in ast.unparse(match.node.body):
            return Fix()
        edit = Edit(*self.source.span(match.node), "str({ctx}.device)")
        return Fix("unsafe", (edit,), (), True)

    def _pam301(self, match: Match) -> Fix:
        node = match.node
        if not isinstance(node, ast.Call) or node.args or node.keywords:
            return Fix()
        edit = Edit(*self.source.span(node.func), "clear_cache")
        return Fix("safe", (edit,), ("clear_cache",))

    def _pam302(self, match: Match) -> Fix:
        node = match.node
        if not isinstance(node, ast.Call) or node.args or node.keywords:
            return Fix()
        edit = Edit(*self.source.span(node.func), "{ctx}.synchronize")
        return Fix("unsafe" if self.several else "safe", (edit,), (), True)

    def _pam304(self, match: Match) -> Fix:
        before, lines = match.before, self.source.line_span(match.statement)
        alone = isinstance(match.statement, ast.Expr) and match.statement.value is match.node
        if not alone or lines is None or before is None:
            return Fix()
        if not (isinstance(before, ast.Expr) and isinstance(before.value, ast.Call)):
            return Fix()
        assert isinstance(match.node, ast.Call)
        mine, theirs = ([ast.dump(a) for a in one.args] for one in (match.node, before.value))
        if match.scope.resolve(before.value.func) not in SEEDS or mine != theirs:
            return Fix()
        return Fix("safe", (Edit(*lines, ""),))

    def _pam502(self, match: Match) -> Fix:
        assert isinstance(match.node, ast.Call)
        device, context, _ = self._device(match)
        last: list[ast.expr | ast.keyword] = [*match.node.args, *match.node.keywords]
        if not last:
            return Fix()
        at = max(self.source.span(one)[1] for one in last)
        return Fix("unsafe", (Edit(at, at, f", map_location={device}"),), (), context)


POSITIONAL = ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled")
SEEDS = ("torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all")


def _targets(statement: ast.stmt) -> set[str]:
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return {one.id for one in targets if isinstance(one, ast.Name)}


def _first_card(node: ast.expr) -> bool:
    """Whether it is the device that a context has where there is CUDA."""
    return isinstance(node, ast.Constant) and node.value in ("cuda", "cuda:0")
