"""Small wrong changes to a module: one at a time, each a piece of its text put in another's place.

Finished tools were looked at first. mutmut 3 turns functions into trampolines, which Triton cannot compile; cosmic-ray
8 knows neither a left-out statement nor a left-out argument or call, which are the mistakes that people make.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
ARITHMETIC = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "|", ast.LShift: ">>", ast.RShift: "<<", ast.MatMult: "*",
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum",
    "argmin": "argmax", "argmax": "argmin", "amin": "amax", "amax": "amin", "floor": "ceil", "ceil": "floor",
    "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "ones_like": "zeros_like",
}  # fmt: skip
MODULES = ("torch", "tl", "F", "nn", "math", "os", "json", "shutil", "triton", "re", "yaml", "cpu", "inspect", "time")
# Without these calls, a line hardly ever runs to its end: such a mutant says nothing about the tests.
NEEDED = set(
    "len range enumerate zip iter type open dict isinstance dim numel item tolist size stride storage_offset cat stack "
    "chunk unbind items keys values split unflatten rpartition arange partial register add_argument get_parameter "
    "named_parameters parameters modules named_modules get_text_config read_text load load_file save_file get_tensor"
    .split()
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One wrong change of a module.

    Attributes:
        path: of the module, from the repository's root.
        line: where the change begins, counted from 1.
        start, end: the characters of the module's text that ``text`` replaces.
        before, after: the changed lines without their indentation, in one; they name the mutant when lines move.
    """

    path: str
    line: int
    start: int
    end: int
    text: str
    before: str
    after: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


def mutants(path: str, source: str, wanted: Callable[[str, str], bool] = lambda before, after: True) -> list[Mutant]:
    """All mutants of a module's text, in the order of their places; each compiles.

    Args:
        wanted: which are, by the changed lines before and after.
    """
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    found: dict[str, Mutant] = {}
    for start, end, text in sorted(finder.changes):
        changed = source[:start] + text + source[end:]
        if source[start:end] == text or changed in found:
            continue
        first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
        lines = source[first:last], source[first:start] + text + source[end:last]
        before, after = (" ".join(each.split()) for each in lines)
        if not wanted(before, after):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(changed, path, "exec")
        except SyntaxError:
            continue
        found[changed] = Mutant(path, source.count("\n", 0, start) + 1, start, end, text, before, after)
    return list(found.values())


class _Finder(ast.NodeVisitor):
    """Collects (start, end, text); texts, messages, annotations and decorators are passed over."""

    def __init__(self, source: str):
        self.source, self.changes = source, []
        lines = source.splitlines(keepends=True)
        self._lines = [line.encode() for line in lines]
        self._starts = [0]
        for line in lines:
            self._starts.append(self._starts[-1] + len(line))

    def _place(self, line: int, column: int) -> int:
        return self._starts[line - 1] + len(self._lines[line - 1][:column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._place(node.lineno, node.col_offset), self._place(node.end_lineno, node.end_col_offset)

    def _text(self, node: ast.AST) -> str:
        return self.source[slice(*self._span(node))]

    def _replace(self, node: ast.AST, text: str) -> None:
        self.changes.append((*self._span(node), text))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        pass  # the condition before it is mutated

    def visit_Assert(self, node: ast.Assert) -> None:
        pass  # they tell the type checker what is known

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self._replace(node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass")
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._replace(node, "pass")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._replace(node.test, "False")
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):  # those are turned round in their own place
            self._replace(node.test, f"not ({self._text(node.test)})")
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._replace(node.test, "False")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._replace(node, f"({self._text(node.body)})")
        self._replace(node, f"({self._text(node.orelse)})")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._replace(test, "True")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        places = [node.left, *node.comparators]
        for left, op, right in zip(places, node.ops, places[1:], strict=False):
            begin, end = self._span(left)[1], self._span(right)[0]
            if self.source[begin:end].strip() not in ("", ")", "("):
                old = {ast.NotIn: "not in", ast.IsNot: "is not"}.get(type(op)) or _symbol(op)
                at = self.source.find(old, begin, end)
                if at >= 0:
                    self.changes.append((at, at + len(old), COMPARISONS[type(op)]))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = isinstance(node.left, ast.Constant | ast.JoinedStr) and isinstance(getattr(node.left, "value", ""), str)
        if not text:
            begin, end, old = self._span(node.left)[1], self._span(node.right)[0], _symbol(node.op)
            at = self.source.find(old, begin, end)
            if at >= 0:
                self.changes.append((at, at + len(old), ARITHMETIC[type(node.op)]))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        values = [f"({self._text(value)})" for value in node.values]
        self._replace(node, f"({f' {new} '.join(values)})")
        for left_out in range(len(values)):
            self._replace(node, f"({f' {old} '.join(v for i, v in enumerate(values) if i != left_out)})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self._replace(node, f"({self._text(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value))
        elif isinstance(node.value, int):
            self._replace(node, str(node.value + 1))
        elif isinstance(node.value, float):
            self._replace(node, f"{node.value + 1!r}")

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if name in NAMES:
            end = self._span(function)[1]
            self.changes.append((end - len(name), end, NAMES[name]))
        of_module = isinstance(function, ast.Attribute) and self._text(function.value).split(".")[0] in MODULES
        if name not in NEEDED and not name[:1].isupper():
            if isinstance(function, ast.Attribute) and not of_module:
                self._replace(node, f"({self._text(function.value)})")
            elif len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred):
                self._replace(node, f"({self._text(node.args[0])})")
        for keyword in node.keywords:
            if keyword.arg is not None and not name[:1].isupper():
                start, end = self._span(keyword)
                rest = self.source[end:].lstrip()
                end = self.source.index(",", end) + 1 if rest.startswith(",") else end
                self.changes.append((start, end, ""))
        arguments = node.args[:1] if name in ("isinstance", "issubclass") else node.args
        for child in (function, *arguments, *(keyword.value for keyword in node.keywords)):
            self.visit(child)


def _symbol(op: ast.AST) -> str:
    """How an operator is written."""
    if isinstance(op, ast.operator):
        return ast.unparse(ast.BinOp(ast.Name("a"), op, ast.Name("b")))[2:-2]
    return ast.unparse(ast.Compare(ast.Name("a"), [op], [ast.Name("b")]))[2:-2]


def mutants_of(source: str, path: str, known: set[tuple[str, str, str]]) -> list[Mutant]:
    """All mutants but those known to be equivalent, as (path, before, after)."""
    return mutants(path, source, lambda before, after: (path, before, after) not in known)
