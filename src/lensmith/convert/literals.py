"""What a Python expression is worth without running it: literals, constants of the file, and plain arithmetic on them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from lensmith.convert.nouns import Reference

ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
"""As in `max_pixels=1280 * 32 * 32`. No powers and no strings: a short expression must not make a large value."""


class Computed(Exception):
    """The value is known only when the code runs."""


class Constants:
    """Names of a script that hold one literal, wherever they are assigned; and its functions, by name."""

    def __init__(self, trees: Sequence[tuple[ast.Module, str]]) -> None:
        """Trees with the words that a line of each is told in: `cell 3, line {}`."""
        nodes = [node for tree, _ in trees for node in ast.walk(tree)]
        self.functions = {
            node.name: f"{place.replace('line', 'lines').format(node.lineno)} to {node.end_lineno}"
            for tree, place in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        self.imported = {name: origin for node in nodes for name, origin in _imports(node)}
        assigned = [pair for node in nodes for pair in _assignments(node)]
        stored = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        parameters = {node.arg for node in nodes if isinstance(node, ast.arg)}
        values = [(name, value) for name, value in assigned if stored.count(name) == len(_of(name, assigned))]
        self.values: dict[str, Any] = {}
        # Constants may be built from constants above them, so one pass in order is enough.
        for name, expression in values:
            same = len({ast.dump(other) for other in _of(name, assigned)}) == 1
            if name in parameters or not same:
                continue
            try:
                self.values[name] = self.read(expression)
            except Computed:
                continue

    def read(self, node: ast.expr) -> Any:  # noqa: PLR0911 (one per kind of expression)
        """The value of an expression, or a Reference for a name that stands for something else than a value.

        Raises:
            Computed: only running it would tell.
        """
        match node:
            case ast.Constant(value=bytes() | complex()):
                raise Computed
            case ast.Constant(value=value):
                return value
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self.read(item) for item in items]
            case ast.Dict(keys=keys, values=items) if None not in keys:
                return {self._key(key): self.read(item) for key, item in zip(keys, items, strict=True) if key}
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(one.arg for one in keywords):
                return {str(one.arg): self.read(one.value) for one in keywords}
            case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(self.read(operand), int | float):
                return -self.read(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return self._compute(self.read(left), op, self.read(right))
            case ast.Name(id=name):
                return self.values[name] if name in self.values else self._refer(name)
            case ast.Attribute():
                return Reference(ast.unparse(node))
        raise Computed

    def _key(self, node: ast.expr) -> str | int | float | None:
        key = self.read(node)
        if isinstance(key, str | int | float | None):
            return key
        raise Computed

    def _compute(self, left: Any, op: ast.operator, right: Any) -> Any:
        apply = ARITHMETIC.get(type(op))
        plain = all(isinstance(side, int | float) and not isinstance(side, bool) for side in (left, right))
        if apply is None or not plain or (apply is operator.floordiv and not right):
            raise Computed
        return apply(left, right)

    def _refer(self, name: str) -> Reference:
        return Reference(self.imported.get(name, name), self.functions.get(name, ""))


def _of(name: str, pairs: Sequence[tuple[str, ast.expr]]) -> list[ast.expr]:
    return [value for other, value in pairs if other == name]


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value


def _imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def is_never(test: ast.expr) -> bool:
    """Whether an `if` is never taken, as notebooks have it: `if False:`."""
    return isinstance(test, ast.Constant) and not test.value


def plain_lines(source: str) -> str:
    """A notebook's cell as Python: shell and magic lines become comments, in the same place."""
    if source.lstrip().startswith("%%"):
        head = source.lstrip().split(maxsplit=1)[0]
        if head not in ("%%time", "%%capture", "%%timeit"):
            return ""
    kept = []
    for line in source.splitlines():
        bare = line.lstrip()
        indent = line[: len(line) - len(bare)]
        kept.append(f"{indent}pass  # {bare}" if bare.startswith(("!", "%")) else line)
    return "\n".join(kept)
