"""Finding data of a web request that reaches a page, a path, a query or a command unescaped: a small data-flow analysis.


Values carry flags (flow.py): USER (text that a visitor chose), BOX (a container of such text), HTML (text with markup),
BUILT (put together from parts), PATH. They flow through assignments, f-strings, `%`, `+`, `.format`, `.join`, containers
and string methods. The result of any other call has no flags (`escape(x)`, `int(x)`, `secure_filename(x)`, `clean(x)`
alike), so that unknown functions raise no false alarm. Branches are merged, loops are read twice, and a name that the
function tests anywhere (`in`, `startswith`, `isalnum`, `re.match` ...) counts as checked from the start.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from rlsafe.rewards.python_security.flow import BOX, BUILT, HTML, NONE, PATH, REQUEST, USER, Flags, Flow, has
from rlsafe.rewards.python_security.rules import Found, Severity, dotted, imported, keyword, last

Function = ast.FunctionDef | ast.AsyncFunctionDef

_ROUTES = {"route", "get", "post", "put", "delete", "patch", "api_route", "websocket"}
_VERBS = {"get", "post", "put", "delete", "patch", "head"}
_PAGES = {"make_response", "Response", "HttpResponse", "HTMLResponse", "Markup", "mark_safe", "write"}
_ALWAYS_PAGES = {"make_response", "HTMLResponse", "Markup", "mark_safe"}
_FILES = {
    *(
        "open",
        "io.open",
        "codecs.open",
        "aiofiles.open",
        "os.remove",
        "os.unlink",
        "os.rmdir",
        "os.listdir",
        "os.scandir",
    ),
    *(
        "os.makedirs",
        "os.mkdir",
        "os.rename",
        "os.replace",
        "shutil.rmtree",
        "shutil.copy",
        "shutil.move",
        "shutil.copyfile",
    ),
    *("send_file", "flask.send_file", "FileResponse", "static_file"),
}
_PATH_METHODS = {"open", "read_text", "read_bytes", "write_text", "write_bytes", "unlink", "rmdir", "mkdir", "touch"}
_FETCHES = {"urlopen", "urlretrieve", "urllib.request.urlopen", "urllib.request.urlretrieve"}
_CLIENTS = {"requests", "httpx", "session", "client", "aiohttp"}
_EXECUTES = {"execute", "executemany", "executescript", "raw", "read_sql", "read_sql_query"}
_COMMANDS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec"}
_RUNS = {"subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "subprocess.Popen"}
_TESTS = {
    "startswith",
    "endswith",
    "isalnum",
    "isdigit",
    "isnumeric",
    "isidentifier",
    "is_relative_to",
    "match",
    "fullmatch",
}
_PATH_GUARDS = {"commonpath", "commonprefix", "is_relative_to", "safe_join", "relative_to", "secure_filename"}


def taint_findings(tree: ast.Module) -> Iterator[Found]:
    """Every place where a visitor's text reaches a sink."""
    module = _Module(tree)
    for _ in range(2):  # text that one view stores may be shown by an earlier one
        found: set[Found] = set()
        for function, owner in module.functions:
            found |= module.read(function, owner)
        if not module.stored:
            break
    yield from sorted(found)


class _Module:
    """What functions of a module share: imports, the framework, and module-level containers with visitors' text in them."""

    def __init__(self, tree: ast.Module) -> None:
        self.imports = imported(ast.walk(tree))
        self.asynchronous = any(o.split(".")[0] in ("fastapi", "starlette", "litestar") for o in self.imports.values())
        self.functions = list(_functions(tree))
        self.globals = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.stored: dict[str, Flags] = {}

    def read(self, function: Function, owner: ast.ClassDef | None) -> set[Found]:
        route = next(
            (d for d in function.decorator_list if last(_called(d)) in _ROUTES and "." in dotted(_called(d))), None
        )
        view_class = owner is not None and any(last(base).endswith(("View", "RequestHandler")) for base in owner.bases)
        view = route is not None or (view_class and function.name in _VERBS)
        names = dict(self.stored)
        if self.imports.get("request", "flask.request").endswith("request"):
            names["request"] = frozenset({REQUEST})
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        for argument in arguments:
            if argument.arg in ("request", "req") or _annotation(argument).endswith("Request"):
                names[argument.arg] = frozenset({REQUEST})
            elif view and argument.arg != "self" and _is_text(argument, route):
                names[argument.arg] = frozenset({USER})
            else:
                names.pop(argument.arg, None)
        nodes = list(ast.walk(function))
        handler = view_class and function.name.startswith("do_")
        returns_page = view and (not self.asynchronous or _says_html(route)) and not _says_plain(nodes)
        reader = _Reader(Flow(names, handler), _checked_names(nodes), returns_page, _guards_paths(nodes))
        reader.block(function.body)
        for name in self.globals:
            if BOX in (flags := reader.flow.names.get(name, NONE)):
                self.stored[name] = flags
        return reader.found


class _Reader:
    """Follows the statements of one function."""

    def __init__(self, flow: Flow, checked: set[str], returns_page: bool, guards_paths: bool) -> None:
        self.flow, self.checked = flow, checked
        self.returns_page, self.guards_paths = returns_page, guards_paths
        self.found: set[Found] = set()
        self.loops = 0

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return  # nested functions are read separately
        for expression in _own_expressions(node):
            for call in (n for n in ast.walk(expression) if isinstance(n, ast.Call)):
                self._sink(call)
                self._grows(call)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            flags = self.flow.of(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._bind(target, flags)
        elif isinstance(node, ast.AugAssign):
            sum_of = ast.BinOp(left=_loaded(node.target), op=node.op, right=node.value)
            self._bind(node.target, self.flow.of(sum_of))
        elif isinstance(node, ast.For | ast.AsyncFor):
            for _ in self._rounds():
                self._bind(node.target, self.flow.element(self.flow.of(node.iter)))
                self._branch(node.body)
            self.block(node.orelse)
        elif isinstance(node, ast.While):
            for _ in self._rounds():
                self._branch(node.body)
            self.block(node.orelse)
        elif isinstance(node, ast.If):
            self._branch(node.body, node.orelse)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                if item.optional_vars is not None:
                    self._bind(item.optional_vars, self.flow.of(item.context_expr))
            self.block(node.body)
        elif isinstance(node, ast.Try):
            self.block(node.body)
            self._branch(*(handler.body for handler in node.handlers))
            self.block([*node.orelse, *node.finalbody])
        elif isinstance(node, ast.Match):
            self._branch(*(case.body for case in node.cases))
        elif isinstance(node, ast.Return) and self.returns_page and node.value is not None:
            value = node.value.elts[0] if isinstance(node.value, ast.Tuple) and node.value.elts else node.value
            self._page(value, node.lineno)

    def _rounds(self) -> Iterator[int]:
        """Two rounds for an outermost loop, because the start of the body may use what its end stored; one for loops inside it,
        since two at every level would take 2^depth."""
        self.loops += 1
        yield from range(2 if self.loops == 1 else 1)
        self.loops -= 1

    def _bind(self, target: ast.expr, flags: Flags) -> None:
        if not (isinstance(target, ast.Name) and target.id in self.checked):
            self.flow.bind(target, flags)

    def _branch(self, *bodies: Sequence[ast.stmt]) -> None:
        """Read each body from the same state; afterwards a name has the flags of every body, and those from before."""
        before = self.flow.names
        ends = [before] if len(bodies) < 2 or not all(bodies) else []
        for body in bodies:
            self.flow.names = dict(before)
            self.block(body)
            if not (body and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)):
                ends.append(self.flow.names)
        self.flow.names = {
            name: NONE.union(*(end.get(name, NONE) for end in ends)) for name in {n for end in ends for n in end}
        }

    def _grows(self, call: ast.Call) -> None:
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("append", "add", "insert", "extend", "update"):
            flags = NONE.union(*(self.flow.of(a) for a in call.args))
            if USER in flags or BOX in flags:
                self.flow.put_into(call.func.value, flags)

    # ------------------------------------------------------------------------------------------------ sinks

    def _page(self, value: ast.expr, line: int) -> None:
        flags = self.flow.of(value)
        if USER in flags and BOX not in flags and PATH not in flags:
            self._report("xss", "medium", line, "a visitor's text is put into a page unescaped")

    def _sink(self, call: ast.Call) -> None:
        if not call.args and not call.keywords and not isinstance(call.func, ast.Attribute):
            return
        name, full, line = last(call.func), dotted(call.func), call.lineno
        argument = call.args[0] if call.args else keyword(call, "content")
        flags = self.flow.of(argument)
        user = USER in flags and BOX not in flags
        if name in ("render_template_string", "from_string") or (name == "Template" and HTML in flags):
            if user:
                self._report("template-injection", "high", line, "a visitor's text becomes part of a template")
        elif name in _PAGES and user and (HTML in flags or name in _ALWAYS_PAGES):
            if not _plain(call) and (HTML in flags or self.returns_page or name != "make_response"):
                self._report("xss", "medium", line, "a visitor's text is put into a page unescaped")
        elif full in _FILES and user and not self.guards_paths:
            self._report("path-traversal", "medium", line, "a visitor's text names a file")
        elif name == "save" and user and BUILT in flags and not self.guards_paths:
            self._report(
                "path-traversal", "medium", line, "an upload is stored under the name that the visitor gave it"
            )
        elif name in _PATH_METHODS and not self.guards_paths and isinstance(call.func, ast.Attribute):
            if has(self.flow.of(call.func.value), USER, PATH):
                self._report("path-traversal", "medium", line, "a visitor's text names a file")
        elif name == "redirect" and user and BUILT not in flags:
            self._report("open-redirect", "medium", line, "a visitor's text says where to go next")
        elif (full in _FETCHES or (full.split(".")[0] in _CLIENTS and name in _VERBS)) and user and BUILT not in flags:
            self._report("request-forgery", "medium", line, "the server fetches what a visitor names")
        elif name in _EXECUTES and user:
            self._report("sql-injection", "high", line, "a visitor's text becomes part of a query")
        elif full in _COMMANDS and user or (full in _RUNS and user and _shell(call)):
            self._report("command-injection", "high", line, "a visitor's text is run")

    def _report(self, rule: str, severity: Severity, line: int, text: str) -> None:
        self.found.add((rule, severity, line, text))


# ---------------------------------------------------------------------------------------------------- looking at functions


def _functions(tree: ast.Module) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    nodes = list(ast.walk(tree))
    owners = {child: node for node in nodes if isinstance(node, ast.ClassDef) for child in node.body}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, owners.get(node)


def _called(decorator: ast.expr) -> ast.expr:
    return decorator.func if isinstance(decorator, ast.Call) else decorator


def _annotation(argument: ast.arg) -> str:
    return last(argument.annotation) if argument.annotation is not None else ""


def _is_text(argument: ast.arg, route: ast.expr | None) -> bool:
    """Whether a view's argument is free text: no converter in the route that checks it (`<int:id>`, `<regex(...):x>`), no
    annotation but str."""
    texts = [n.value for n in ast.walk(route) if isinstance(n, ast.Constant)] if route is not None else []
    rule = next((text for text in texts if isinstance(text, str)), "")
    converted = f":{argument.arg}>" in rule and not any(
        f"<{kind}:{argument.arg}>" in rule for kind in ("string", "path")
    )
    return not converted and _annotation(argument) in ("", "str")


def _says_html(route: ast.expr | None) -> bool:
    chosen = keyword(route, "response_class") if isinstance(route, ast.Call) else None
    return chosen is not None and last(chosen) == "HTMLResponse"


def _checked_names(nodes: Sequence[ast.AST]) -> set[str]:
    """Names whose value the function tests. Looking for a key (`"x" in form`) is not a test of a value."""
    checked = set()
    loops = {n.target.id for n in nodes if isinstance(n, ast.For) and isinstance(n.target, ast.Name)}
    for node in nodes:
        if (
            isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Name)
            and isinstance(node.ops[0], ast.In | ast.NotIn)
        ):
            searched = node.comparators[0]
            if not (
                isinstance(searched, ast.Name) and searched.id in loops
            ):  # `query in line` is a search, not a check
                checked.add(node.left.id)
        elif isinstance(node, ast.Call) and last(node.func) in _TESTS and isinstance(node.func, ast.Attribute):
            checked |= {n.id for n in (node.func.value, *node.args) if isinstance(n, ast.Name)}
    return checked


def _guards_paths(nodes: Sequence[ast.AST]) -> bool:
    calls = {last(n.func) for n in nodes if isinstance(n, ast.Call)}
    return bool(calls & _PATH_GUARDS)


def _own_expressions(node: ast.stmt) -> Iterator[ast.expr]:
    """The expressions of a statement itself, not of the statements inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        elif isinstance(child, ast.withitem):
            yield child.context_expr


def _loaded(target: ast.expr) -> ast.expr:
    return ast.Name(id=target.id, ctx=ast.Load()) if isinstance(target, ast.Name) else target


def _plain(call: ast.Call) -> bool:
    """Whether a call makes a response with a content type other than HTML."""
    kinds = [keyword(call, name) for name in ("mimetype", "content_type", "media_type")]
    return any(isinstance(kind, ast.Constant) and "html" not in str(kind.value) for kind in kinds)


def _says_plain(nodes: Sequence[ast.AST]) -> bool:
    """Whether the function sets a content type other than HTML."""
    texts = (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return any(text.startswith(("text/plain", "application/", "text/csv", "image/")) for text in texts)


def _shell(call: ast.Call) -> bool:
    shell = keyword(call, "shell")
    return isinstance(shell, ast.Constant) and shell.value is True
