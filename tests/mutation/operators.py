"""Operators: which small faults can be put into a module. Those of cosmic-ray, and ours for what it leaves alone."""

from __future__ import annotations

import ast
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

COMPARISONS = ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE",
               "Gt_LtE", "GtE_Gt", "GtE_Lt")  # fmt: skip
# Without those that only make a TypeError of it, which any test notices.
CALCULATIONS = ("Add_Sub", "Sub_Add", "Mul_Add", "BitOr_BitAnd", "BitAnd_BitOr", "FloorDiv_Mul", "Mod_Mul")
CORE = (
    *("AddNot", "ReplaceUnaryOperator_Delete_Not", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "NumberReplacer", "RemoveDecorator"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
    *(f"ReplaceComparisonOperator_{names}" for names in COMPARISONS),
    *(f"ReplaceBinaryOperator_{names}" for names in CALCULATIONS),
)

SQL = re.compile(r"\b(SELECT|UPDATE|INSERT|DELETE|PRAGMA) ")
SQL_SWAPS = (
    (r" AND ", " OR "),
    (r" OR (?!IGNORE|REPLACE)", " AND "),
    (r" = ", " <> "),
    (r" <> ", " = "),
    (r" <= ", " < "),
    (r" IS NULL", " IS NOT NULL"),
    (r" IS NOT NULL", " IS NULL"),
    (r"NOT EXISTS", "EXISTS"),
    (r"'\w+'", "'other'"),
    (r"\b0\b", "1"),
    (r"\b1\b", "2"),
    (r" - ", " + "),
    (r" \+ ", " - "),
    (r" DESC\b", ""),
    (r"ORDER BY [\w., ]+", "ORDER BY random()"),
    (r"FULL", "OFF"),
)


class Mutant(NamedTuple):
    """A module with one fault."""

    name: str  # of the definition with the fault: the same as long as that is the same
    operator: str
    line: int
    was: str  # the lines that are changed, each stripped
    became: str
    source: str  # the whole module


# Ours: each gives, for a node, the texts that may stand in its place. ------------------------------------------------


def remove_statement(node: Any) -> Iterator[str]:
    """A call whose result nobody takes, a raise, an assignment to what is there already."""
    if getattr(node.parent, "type", "") != "simple_stmt":
        return
    is_assignment = node.type == "expr_stmt"
    if is_assignment:
        target, sign = node.children[0], node.children[1]
        is_set_again = sign.get_code().strip() != "=" and sign.type != "annassign"
        if is_set_again or (sign.type != "annassign" and target.type in ("atom_expr", "power")):
            yield "pass"
    elif node.type in ("atom_expr", "power", "raise_stmt"):
        yield "pass"


def drop_operand(node: Any) -> Iterator[str]:
    """`a and b`: only a, only b."""
    if node.type in ("and_test", "or_test"):
        word = node.children[1].value
        parts = [child.get_code().strip() for child in node.children[::2]]
        for number in range(len(parts)):
            yield f" {word} ".join(parts[:number] + parts[number + 1 :])


def drop_filter(node: Any) -> Iterator[str]:
    """`for x in y if z`: without `if z`, and with what it leaves out."""
    if node.type == "comp_if":
        yield "if True"
        yield f"if not ({node.children[1].get_code().strip()})"


def swap_in(node: Any) -> Iterator[str]:
    if node.type == "comparison":
        codes = [child.get_code() for child in node.children]
        for number, code in enumerate(codes):
            other = {"in": " not in", "not in": " in"}.get(code.strip())
            if other:
                yield "".join([*codes[:number], other, *codes[number + 1 :]])


def drop_keyword(node: Any) -> Iterator[str]:
    """`f(a, b=1)`: f(a)."""

    def is_named(child: Any) -> bool:
        return bool(child.type == "argument" and child.children[1].get_code().strip() == "=")

    if node.type == "arglist":
        for number, child in enumerate(node.children):
            if is_named(child):
                first = number if number + 1 < len(node.children) else number - 1  # and one comma
                left = [*node.children[:first], *node.children[first + 2 :]]
                yield "".join(part.get_code() for part in left).strip()
    elif node.type == "trailer" and len(node.children) == 3 and is_named(node.children[1]):
        yield "()"


def catch_nothing(node: Any) -> Iterator[str]:
    if node.type == "except_clause":
        caught = node.children[1].get_code().strip()
        rest = "".join(child.get_code() for child in node.children[2:])
        names = [name.strip() for name in caught.strip("()").split(",") if name.strip()]
        for number in range(len(names)):
            yield f"except ({''.join(f'{name}, ' for name in names[:number] + names[number + 1 :])}){rest}"


def change_word(node: Any) -> Iterator[str]:
    """A code, state or field: not a sentence."""
    if node.type == "string" and re.fullmatch(r'"[a-z][a-z0-9_]*"', node.value):
        yield f'"x{node.value[1:]}'


def change_sql(node: Any) -> Iterator[str]:
    if node.type not in ("string", "fstring_string") or not SQL.search(
        node.parent.get_code() if node.type == "fstring_string" else node.value
    ):
        return
    for pattern, other in SQL_SWAPS:
        for found in re.finditer(pattern, node.value):
            yield node.value[: found.start()] + other + node.value[found.end() :]


OURS = (remove_statement, drop_operand, drop_filter, swap_in, drop_keyword, catch_nothing, change_word, change_sql)


def operator_of(texts: Callable[[Any], Iterator[str]]) -> Operator:
    class Ours(Operator):  # type: ignore[misc,unused-ignore]  # no types where it is not installed
        def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
            return ((node.start_pos, node.end_pos) for _ in texts(node))

        def mutate(self, node: Any, index: int) -> Any:
            text = list(texts(node))[index]
            if node.type == "fstring_string":
                node.value = text
                return node
            return parso.python.tree.Name(text, node.start_pos, node.get_first_leaf().prefix)

        @classmethod
        def examples(cls) -> tuple[()]:
            return ()

    return Ours()


# All mutants of a module ----------------------------------------------------------------------------------------------


def mutants_of(source: str) -> list[Mutant]:
    """Each once, but those in annotations, docstrings and for the type checker, and those that do not compile."""
    tree = get_ast(source)
    left_out = lines_without_effect(source)
    operators = {name: get_operator(f"core/{name}")() for name in CORE}
    operators |= {texts.__name__: operator_of(texts) for texts in OURS}
    found: dict[str, Mutant] = {}
    for operator_name, operator in operators.items():
        positions = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(positions):
            if any(first <= start < last for first, last in left_out):
                continue
            text = mutate_code(source, operator, occurrence)
            if text != source and compiles(text):
                found.setdefault(text, mutant(source, text, operator_name, start[0]))
    return list(found.values())


def lines_without_effect(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    spans: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        spans += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            spans.append(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            spans.append(node)
    return [((s.lineno, s.col_offset), (s.end_lineno, s.end_col_offset)) for s in spans if s is not None]


def compiles(text: str) -> bool:
    try:
        compile(text, "", "exec")
    except SyntaxError:
        return False
    return True


def mutant(source: str, text: str, operator: str, line: int) -> Mutant:
    changes = list(difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    was, became = ("\n".join(c[1:].strip() for c in changes if c.startswith(sign)) for sign in "-+")
    where = definition_at(text, line)
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    return Mutant(name, operator, line, was, became, text)


def definition_at(text: str, line: int) -> str:
    """The text of the outermost definition or statement there."""
    for node in ast.parse(text).body:
        if (
            min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            <= line
            <= (node.end_lineno or 0)
        ):
            return ast.unparse(node)
    return f"{line}: {text}"
