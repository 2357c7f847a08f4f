"""What a name means: through imports, aliases, version shims, and what shadows it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SCOPES = (*FUNCTIONS, ast.ClassDef)
BINDING = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
    *(ast.Assign, ast.AnnAssign, ast.Name, ast.ExceptHandler),
)
STARRED = {
    "torch.cuda.amp": ("autocast", "GradScaler", "custom_fwd", "custom_bwd"),
    "torch.amp": ("autocast", "GradScaler", "custom_fwd", "custom_bwd"),
}
# What leads to the same, and the name that torch documents.
HOMES = (
    ("torch.cuda.amp.autocast_mode.", "torch.cuda.amp."),
    ("torch.cuda.amp.grad_scaler.", "torch.cuda.amp."),
    ("torch.amp.autocast_mode.", "torch.amp."),
    ("torch.amp.grad_scaler.", "torch.amp."),
    ("torch.cuda.memory.", "torch.cuda."),
    ("torch.cuda.random.", "torch.cuda."),
    ("torch.cuda.streams.", "torch.cuda."),
    ("torch.serialization.", "torch."),
    ("torch.nn.parallel.DataParallel", "torch.nn.DataParallel"),
    ("torch.nn.parallel.data_parallel.DataParallel", "torch.nn.DataParallel"),
    ("torch.autocast", "torch.amp.autocast"),
    ("torch.GradScaler", "torch.amp.GradScaler"),
)


def canonical(name: str) -> str:
    """The name that torch documents for it."""
    for found, home in HOMES:
        if name == found or (found.endswith(".") and name.startswith(found)):
            return home + name[len(found) :]
    return name


def own(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope, in order, without those of the functions and classes in it."""
    body = getattr(node, "body", None)
    queue = list(reversed(body)) if isinstance(body, list) else []
    while queue:
        found = queue.pop()
        yield found
        if not isinstance(found, SCOPES):
            queue += reversed(list(ast.iter_child_nodes(found)))


def parameters(arguments: ast.arguments) -> list[tuple[ast.arg, ast.expr | None]]:
    """Every parameter with its default; without those that take the rest, which have none."""
    named = [*arguments.posonlyargs, *arguments.args]
    needed = [None] * (len(named) - len(arguments.defaults))
    defaults = [*needed, *arguments.defaults, *arguments.kw_defaults]
    return [*zip([*named, *arguments.kwonlyargs], defaults, strict=True)]


class Scope:
    """The names that a module, class or function binds, each with all it may stand for."""

    def __init__(self, node: ast.AST, parent: Scope | None = None) -> None:
        self.parent = parent
        self.is_class = isinstance(node, ast.ClassDef)
        self.bound: dict[str, list[str | ast.expr | None]] = {}
        self.defaults: dict[str, ast.expr] = {}
        """Parameter -> what it is where the caller says nothing."""
        self.kinds: dict[str, set[bool]] = {}
        """Name -> whether it is torch's, or not, or either; in except clauses only torch's."""
        if isinstance(node, FUNCTIONS):
            for parameter, default in parameters(node.args):
                self._bind(parameter.arg, None)
                if default:
                    self.defaults[parameter.arg] = default
            for rest in (node.args.vararg, node.args.kwarg):
                if rest:
                    self._bind(rest.arg, None)
        shims: set[int] = set()
        for one in own(node):
            if not isinstance(one, BINDING):
                continue
            if isinstance(one, ast.ExceptHandler):
                shims |= {id(inner) for inner in ast.walk(one)}
            before = {name: len(values) for name, values in self.bound.items()}
            self._read(one)
            for name, values in self.bound.items():
                new = _is_torch(values[-1])
                if len(values) > before.get(name, 0) and (new or id(one) not in shims):
                    self.kinds.setdefault(name, set()).add(new)

    def resolve(self, node: ast.AST, depth: int = 5) -> str | None:
        """The full name of what a (dotted) name stands for, if that was imported."""
        if isinstance(node, ast.Attribute):
            base = self.resolve(node.value, depth)
            return canonical(f"{base}.{node.attr}") if base else None
        if not isinstance(node, ast.Name) or not depth:
            return None
        scope = self.home(node.id)
        if scope is None:  # a star import brought it, or another cell
            return node.id if node.id == "torch" else None
        found = []
        for value in scope.bound[node.id]:
            name = value if isinstance(value, str) else None
            if isinstance(value, (ast.Name, ast.Attribute)):
                name = scope.resolve(value, depth - 1)
            found += [canonical(name)] if name else []
        elsewhere = any(re.match(r"torch\.(mps|xpu|npu|mlu|musa|hpu)\b", name) for name in found)
        found.sort(key=lambda name: not name.startswith("torch."))  # what may be torch's is
        return found[0] if found and not elsewhere else None

    def value(self, node: ast.AST) -> ast.expr | None:
        """What a name was set to, if that is one expression."""
        match self._values(node):
            case [ast.expr() as value]:
                return value
        return None

    def is_alias(self, node: ast.AST) -> bool:
        """Whether a name was set to an expression in the program, and not imported."""
        return any(isinstance(one, ast.expr) for one in self._values(node))

    def device_names(self) -> set[str]:
        """The names in reach that should hold a device."""
        found: set[str] = set()
        scope: Scope | None = self
        while scope:
            if scope is self or not scope.is_class:
                found |= {name for name in scope.bound if name.lower() in ("device", "dev")}
            scope = scope.parent
        return found

    def made_by(self, calls: Sequence[str]) -> set[str]:
        """The names in reach that stand for what one of these calls returns, and for that alone."""
        found: set[str] = set()
        scope: Scope | None = self
        while scope:
            for name in scope.bound:
                value = self.value(ast.Name(name))
                if isinstance(value, ast.Call) and scope.resolve(value.func) in calls:
                    found.add(name)
            scope = scope.parent
        return found

    def sure(self, node: ast.AST) -> bool:
        """Whether a name stands for the same on every path; except clauses are for old versions."""
        while isinstance(node, ast.Attribute):
            node = node.value
        if not isinstance(node, ast.Name):
            return True
        scope = self.home(node.id)
        return not scope or len(scope.kinds.get(node.id, ())) < 2

    def home(self, name: str) -> Scope | None:
        """The scope that binds a name."""
        scope: Scope | None = self
        while scope and (name not in scope.bound or (scope.is_class and scope is not self)):
            scope = scope.parent
        return scope

    def _values(self, node: ast.AST) -> list[str | ast.expr | None]:
        """All that a name may stand for; nothing for what is no name, or bound nowhere."""
        if not isinstance(node, ast.Name):
            return []
        scope = self.home(node.id)
        return scope.bound[node.id] if scope else []

    def _bind(self, name: str, value: str | ast.expr | None) -> None:
        self.bound.setdefault(name, []).append(value)

    def _read(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                self._bind(alias.asname or root, alias.name if alias.asname else root)
        elif isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            for alias in node.names:
                names = STARRED.get(home, ()) if alias.name == "*" else (alias.name,)
                for name in names:
                    self._bind(alias.asname or name, f"{home}.{name}")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self._bind(node.name, None)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self._bind(target.id, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self._bind(node.target.id, node.value)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if not any(isinstance(one, ast.expr) for one in self.bound.get(node.id, ())):
                self._bind(node.id, None)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            self._bind(node.name, None)


def _is_torch(value: str | ast.expr | None) -> bool:
    text = value if isinstance(value, str) else ast.unparse(value) if value else ""
    return text.startswith("torch")
