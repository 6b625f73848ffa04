"""How text that a visitor chose flows through expressions: the flags of an expression from those of its names (see taint.py)."""

from __future__ import annotations

import ast

from rlsafe.rewards.python_security.rules import dotted, has_markup, last

Flags = frozenset[str]
USER, BOX, HTML, BUILT, PATH, REQUEST = "user", "box", "html", "built", "path", "request"
NONE: Flags = frozenset()

REQUEST_PARTS = {
    *(
        "args",
        "form",
        "values",
        "cookies",
        "headers",
        "files",
        "json",
        "data",
        "GET",
        "POST",
        "FILES",
        "COOKIES",
        "params",
    ),
    *("query", "query_params", "path_params", "match_info", "query_arguments", "body_arguments", "forms", "view_args"),
}
REQUEST_TEXT = {"get_data", "get_argument", "get_body_argument", "get_query_argument", "body", "query_string"}
REQUEST_BOXES = {"get_json", "json", "form", "post", "get_arguments"}
_BOX_TEXT = {"get", "pop", "getfirst", "get_one", "getvalue", "setdefault", "read"}
_BOX_BOX = {"items", "values", "keys", "to_dict", "getlist", "copy", "get_all", "dict"}
_TEXT_TEXT = {
    *(
        "strip",
        "lstrip",
        "rstrip",
        "lower",
        "upper",
        "title",
        "capitalize",
        "replace",
        "encode",
        "decode",
        "format",
        "read",
    ),
    *(
        "removeprefix",
        "removesuffix",
        "casefold",
        "swapcase",
        "zfill",
        "center",
        "ljust",
        "rjust",
        "expandtabs",
        "as_posix",
    ),
}
_TEXT_BOX = {"split", "rsplit", "splitlines", "partition", "rpartition"}
_TEXT_CALLS = {"str", "repr", "unquote", "unquote_plus", "b64decode", "fsdecode", "format"}
_BOX_CALLS = {"dict", "list", "tuple", "set", "sorted", "reversed", "loads", "enumerate", "zip", "parse_qs"}
_PATH_CALLS = {
    "os.path.join",
    "os.path.abspath",
    "os.path.normpath",
    "os.path.expanduser",
    "os.path.realpath",
    "os.fspath",
}


def has(flags: Flags, *wanted: str) -> bool:
    return all(flag in flags for flag in wanted)


def tainted(flags: Flags) -> bool:
    return USER in flags or BOX in flags


class Flow:
    """The flags of the names in one function, and of expressions made of them."""

    def __init__(self, names: dict[str, Flags], handler: bool = False) -> None:
        self.names = names
        self.handler = handler  # a method of an http.server handler: self.path is the visitor's

    def of(self, node: ast.AST | None) -> Flags:
        """The flags of an expression."""
        method = getattr(self, f"_{type(node).__name__}", None)
        return method(node) if method is not None else NONE

    def bind(self, target: ast.AST, flags: Flags) -> None:
        """Give a target (name, tuple, item or attribute of a container) its flags."""
        if isinstance(target, ast.Name):
            self.names[target.id] = flags
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self.bind(part, self.element(flags))
        elif isinstance(target, ast.Starred):
            self.bind(target.value, flags)
        elif isinstance(target, ast.Subscript | ast.Attribute) and isinstance(target.value, ast.Name):
            if tainted(flags):
                self.put_into(target.value, flags)

    def put_into(self, container: ast.AST, flags: Flags) -> None:
        """`container` now also holds something with these flags."""
        if isinstance(container, ast.Name) and REQUEST not in self.names.get(container.id, NONE):
            self.names[container.id] = self.names.get(container.id, NONE) | {BOX} | (flags & {HTML})

    @staticmethod
    def element(flags: Flags) -> Flags:
        """The flags of something taken out of a container or a string."""
        return (flags - {BOX, BUILT} | {USER}) if tainted(flags) else NONE

    # ------------------------------------------------------------------------------------------------ leaves

    def _Name(self, node: ast.Name) -> Flags:
        return self.names.get(node.id, NONE)

    def _Constant(self, node: ast.Constant) -> Flags:
        return frozenset({HTML}) if isinstance(node.value, str) and has_markup(node.value) else NONE

    def _Attribute(self, node: ast.Attribute) -> Flags:
        base = self.of(node.value)
        if self.handler and dotted(node) == "self.path":
            return frozenset({USER})
        if REQUEST in base or dotted(node.value) in ("self.request", "flask.request"):
            if node.attr in REQUEST_TEXT:
                return frozenset({USER})
            return frozenset({BOX}) if node.attr in REQUEST_PARTS else NONE
        return self.element(base - {PATH}) if tainted(base) else NONE

    def _Subscript(self, node: ast.Subscript) -> Flags:
        return self.element(self.of(node.value))

    # ------------------------------------------------------------------------------------------------ compositions

    def _JoinedStr(self, node: ast.JoinedStr) -> Flags:
        parts = [self.of(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values]
        return self._text(parts, built=True)

    def _BinOp(self, node: ast.BinOp) -> Flags:
        left, right = self.of(node.left), self.of(node.right)
        if isinstance(node.op, ast.Div):
            return self._text([left, right], built=True) | {PATH} if PATH in left | right else NONE
        return self._text([left, right], built=True) if isinstance(node.op, ast.Add | ast.Mod) else NONE

    def _IfExp(self, node: ast.IfExp) -> Flags:
        return self.of(node.body) | self.of(node.orelse)

    def _BoolOp(self, node: ast.BoolOp) -> Flags:
        return NONE.union(*(self.of(value) for value in node.values))

    def _NamedExpr(self, node: ast.NamedExpr) -> Flags:
        flags = self.of(node.value)
        self.bind(node.target, flags)
        return flags

    def _Await(self, node: ast.Await) -> Flags:
        return self.of(node.value)

    def _Starred(self, node: ast.Starred) -> Flags:
        return self.of(node.value)

    def _List(self, node: ast.List | ast.Tuple | ast.Set) -> Flags:
        return self._box([self.of(element) for element in node.elts])

    _Tuple = _Set = _List

    def _Dict(self, node: ast.Dict) -> Flags:
        return self._box([self.of(value) for value in node.values])

    def _ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Flags:
        return self._box([self._within(node, node.elt)])

    _SetComp = _GeneratorExp = _ListComp

    def _DictComp(self, node: ast.DictComp) -> Flags:
        return self._box([self._within(node, node.value)])

    def _within(self, comprehension: ast.AST, element: ast.expr) -> Flags:
        inner = Flow(dict(self.names), self.handler)
        for part in comprehension.generators:  # type: ignore[attr-defined]
            inner.bind(part.target, inner.element(inner.of(part.iter)))
        return inner.of(element)

    # ------------------------------------------------------------------------------------------------ calls

    def _Call(self, node: ast.Call) -> Flags:
        name = last(node.func)
        given = [self.of(a) for a in node.args] + [self.of(k.value) for k in node.keywords]
        if isinstance(node.func, ast.Attribute):
            base, owner = self.of(node.func.value), dotted(node.func.value)
            if REQUEST in base or owner in ("self", "self.request", "flask.request"):
                if name in REQUEST_TEXT:
                    return frozenset({USER})
                if name in REQUEST_BOXES and owner != "self":
                    return frozenset({BOX})
            if name == "join" and dotted(node.func) not in _PATH_CALLS:
                return self._text([base, *(self.element(flags) | (flags & {HTML}) for flags in given)], built=True)
            if name in ("format", "format_map"):
                spread = [self.element(flags) | (flags & {HTML}) for flags in given]
                return self._text([base, *spread], built=True)
            if BOX in base:
                if name in _BOX_TEXT:
                    return self.element(base)
                return base if name in _BOX_BOX else NONE
            if USER in base and (name in _TEXT_TEXT or name in _TEXT_BOX):
                return base if name in _TEXT_TEXT else base - {USER} | {BOX}
            if HTML in base and name == "replace":
                return self._text([base, *given[1:]], built=True)
        if dotted(node.func) in _PATH_CALLS:
            return self._text(given, built=len(given) > 1)
        if name in ("Path", "PurePath"):
            return self._text(given, built=len(given) > 1) | {PATH}
        if name in _TEXT_CALLS:
            return self._text([self.element(flags) | (flags & {HTML}) for flags in given[:1]])
        if name in _BOX_CALLS:
            return self._box(given)
        return NONE

    def _text(self, parts: list[Flags], built: bool = False) -> Flags:
        """The flags of a text made of these parts; a container in it counts as the text that it holds."""
        joined = NONE.union(*parts)
        if not tainted(joined):
            return joined & {HTML, PATH}
        return joined - {BOX} | {USER} | ({BUILT} if built else NONE)

    def _box(self, parts: list[Flags]) -> Flags:
        joined = NONE.union(*parts)
        return (joined & {HTML}) | {BOX} if tainted(joined) else NONE
