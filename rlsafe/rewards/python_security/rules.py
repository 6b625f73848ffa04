"""Insecure patterns that bandit does not report, found in the syntax tree alone (no data flow; that is taint.py).

Each rule is meant to have no false alarms: it reports code that is unsafe as written, not code that might be.
"""

from __future__ import annotations

import ast
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

Severity = Literal["low", "medium", "high"]
Found = tuple[str, Severity, int, str]
"""(rule, severity, line, text)"""

_TAG = re.compile(r"<\s*/?[a-zA-Z][^<>]*>?")
_SECRET_NAME = re.compile(
    r"token|passw(?:or)?d|passcode|secret|\botp\b|_otp|otp_|api_?key|session_?(?:id|key)|salt|nonce|csrf", re.IGNORECASE
)
_KEY_NAME = re.compile(
    r"(?:^|_)(?:secret_?key|api_?key|access_?key|private_?key|secret_?access_?key|auth_?token|db_?pass)$", re.IGNORECASE
)
_PLACEHOLDER = re.compile(r"^$|^<.*>$|^\$\{?\w+\}?$|^%\(?\w+|^\{\w*\}$|^[A-Z_]+$")
_URL_WITH_PASSWORD = re.compile(r"^[a-z][a-z0-9+]*://[^\s:/@{}$]+:[^\s:/@{}$]+@[^\s/]+", re.IGNORECASE)
_CHMOD = re.compile(r"\bchmod\s+(?:-\w+\s+)*(?:[0-7]?[0-7][0-7][2367]\b|[aou]*[ao][ugoa]*\+[rwx]*w)")
_MODE_CALLS = {"chmod": 1, "fchmod": 1, "lchmod": 1, "mkdir": 1, "makedirs": 1, "mkfifo": 1, "open": 2}
_TARS = {"tarfile.open", "tarfile.TarFile", "tarfile.TarFile.open"}
_RANDOM = {"random", "randint", "choice", "choices", "sample", "randrange", "getrandbits", "shuffle"}
_FAST_HASHES = {"md5", "sha1", "sha224", "sha256", "sha384", "sha512"}


def pattern_findings(tree: ast.Module) -> Iterator[Found]:
    """Every finding of every rule."""
    nodes = list(ast.walk(tree))
    facts = _Facts(nodes)
    yield from _extractions(tree, frozenset(facts.archives), facts)
    for node in nodes:
        if isinstance(node, ast.Call):
            yield from _call(node, facts)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from _assign(node, facts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _URL_WITH_PASSWORD.match(node.value):
                yield "hardcoded-credentials", "medium", node.lineno, "a URL with a password in it"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(node, facts)
        elif isinstance(node, ast.Expr) and facts.drops_umask(node):
            yield "world-writable", "medium", node.lineno, "umask 0 lets new files be writable by anyone"


def dotted(node: ast.AST) -> str:
    """`os.path.join` of an attribute chain; calls and subscripts inside become `()` and `[]`; "" for anything else."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Call):
            parts.append("()")
            node = node.func
        elif isinstance(node, ast.Subscript):
            parts.append("[]")
            node = node.value
        else:
            parts.append(node.id if isinstance(node, ast.Name) else "")
            return ".".join(reversed(parts))


def last(node: ast.AST) -> str:
    return dotted(node).rpartition(".")[2]


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def has_markup(text: str) -> bool:
    """Whether it holds an HTML tag."""
    return _TAG.search(text) is not None


def imported(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Local name -> what was imported under it (`Template` -> `jinja2.Template`)."""
    names: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module or ''}.{a.name}" for a in node.names}
    return names


class _Facts:
    """What rules look up about a module: imports, names bound exactly once (and to what), names of archives."""

    def __init__(self, nodes: Sequence[ast.AST]) -> None:
        self.imports = imported(nodes)
        self.constants: dict[str, ast.expr] = {}
        self.archives: set[str] = set()
        self.no_umask = False
        bound: Counter[str] = Counter()
        for node in nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound[node.id] += 1
            elif isinstance(node, ast.arg):
                bound[node.arg] += 1
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value
                if self.opens_tar(node.value):
                    self.archives.add(node.targets[0].id)
            elif isinstance(node, ast.arguments):
                plain = [*node.posonlyargs, *node.args]
                pairs = [*zip(plain[len(plain) - len(node.defaults) :], node.defaults, strict=True)]
                pairs += [(a, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True) if d is not None]
                self.constants |= {argument.arg: default for argument, default in pairs}
            self.no_umask |= self.drops_umask(node)
        self.constants = {name: value for name, value in self.constants.items() if bound[name] == 1}

    def opens_tar(self, value: ast.expr) -> bool:
        return isinstance(value, ast.Call) and self.origin(value.func) in _TARS

    def drops_umask(self, node: ast.AST) -> bool:
        """A bare `os.umask(0)`; `old = os.umask(0)` only reads it."""
        return (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and self.origin(node.value.func) == "os.umask"
            and bool(node.value.args)
            and self.mode(node.value.args[0]) == 0
        )

    def origin(self, func: ast.expr) -> str:
        """The dotted name with its import resolved: `Template` -> `jinja2.Template`."""
        head, dot, tail = dotted(func).partition(".")
        return self.imports.get(head, head) + dot + tail

    def mode(self, node: ast.expr | None, seen: int = 0) -> int | None:
        """The integer that a permission expression stands for: 0o777, stat.S_IRWXU | stat.S_IRWXO, int("777", 8), MODE."""
        if node is None or seen > 8:
            return None
        if isinstance(node, ast.Constant):
            return node.value if type(node.value) is int else None
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.mode(self.constants[node.id], seen + 1)
        if isinstance(node, ast.Attribute | ast.Name) and self.origin(node).startswith("stat.S_I"):
            return getattr(stat, self.origin(node).removeprefix("stat."), None)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = self.mode(node.left, seen + 1), self.mode(node.right, seen + 1)
            known = [side for side in sides if side is not None]
            return known[0] | known[-1] if known else None  # an unknown side can only add bits
        if isinstance(node, ast.Call) and dotted(node.func) == "int" and len(node.args) == 2:
            text, base = (a.value if isinstance(a, ast.Constant) else None for a in node.args)
            if isinstance(text, str) and base == 8 and re.fullmatch(r"(?:0o)?[0-7]{1,6}", text):
                return int(text, 8)
        return None


def _call(node: ast.Call, facts: _Facts) -> Iterator[Found]:
    name, origin, line = last(node.func), facts.origin(node.func), node.lineno
    first = node.args[0] if node.args else None
    if name in ("Template", "Environment", "SandboxedEnvironment"):
        off = is_constant(keyword(node, "autoescape"), False)
        raw = origin == "jinja2.Template" and keyword(node, "autoescape") is None
        if off or (raw and isinstance(first, ast.Constant) and _renders_html(first.value)):
            yield "autoescape-off", "high" if off else "medium", line, "a template that does not escape what it renders"
    if name in _MODE_CALLS:
        yield from _mode(node, name, origin, facts)
    if origin.startswith(("os.system", "os.popen", "subprocess.")) and _CHMOD.search(_words(node, facts)):
        yield "world-writable", "high", line, "a shell command that lets anyone write"
    if name in ("decode", "verify") and origin.startswith("jwt.") and _unverified(node):
        yield "jwt-unverified", "high", line, "a token is read without checking its signature"
    if origin in ("ssl._create_unverified_context",) or is_constant(keyword(node, "verify_ssl"), False):
        yield "tls-unverified", "high", line, "TLS certificates are not checked"
    if any(
        facts.origin(k.value) == "ssl.CERT_NONE" for k in node.keywords if isinstance(k.value, ast.Attribute | ast.Name)
    ):
        yield "tls-unverified", "high", line, "TLS certificates are not checked"
    if name == "new" and any(last(a).startswith("MODE_ECB") for a in node.args):
        yield "ecb-mode", "medium", line, "ECB mode shows equal blocks"
    if origin in ("jsonpickle.decode", "jsonpickle.loads", "yaml.unsafe_load", "yaml.unsafe_load_all"):
        yield "unsafe-load", "high", line, "loads objects that can run code"
    if origin.startswith("hashlib.") and name in _FAST_HASHES and first is not None and _names_password(first):
        yield "fast-password-hash", "medium", line, "a password behind a fast, unsalted hash"
    if (
        name == "CORS"
        and is_constant(keyword(node, "supports_credentials"), True)
        and _is_star(keyword(node, "origins"))
    ):
        yield "cors-any-origin", "medium", line, "any site may use the visitor's credentials"


def _mode(node: ast.Call, name: str, origin: str, facts: _Facts) -> Iterator[Found]:
    """World-writable modes: severe for chmod, which sets the mode as written; less for mkdir and open, where the umask applies."""
    place, creates = _MODE_CALLS[name], not name.endswith("chmod")
    if name == "open" and origin != "os.open":
        return
    if name in ("chmod", "mkdir") and len(node.args) == 1 and isinstance(node.func, ast.Attribute):
        place = 0  # Path.chmod(mode), Path.mkdir(mode)
    mode = facts.mode(keyword(node, "mode") or (node.args[place] if len(node.args) > place else None))
    usual = creates and not facts.no_umask
    if mode is not None and mode & stat.S_IWOTH and not (usual and name == "open" and not mode & stat.S_IXOTH):
        yield "world-writable", "low" if usual else "high", node.lineno, f"anyone may write: mode {oct(mode)}"


def _assign(node: ast.Assign | ast.AnnAssign, facts: _Facts) -> Iterator[Found]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    for target in targets:
        name = _target_name(target)
        value = node.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and _KEY_NAME.search(name):
            same = value.value.lower().replace("_", "") == name.lower().replace(
                "_", ""
            )  # apiKey = "apiKey" names a field
            if not same and not _PLACEHOLDER.match(value.value):
                yield "hardcoded-credentials", "medium", node.lineno, f"{name} is written in the code"
        if name == "autoescape" and isinstance(target, ast.Attribute) and is_constant(value, False):
            yield "autoescape-off", "high", node.lineno, "a template that does not escape what it renders"
        if name == "check_hostname" and is_constant(value, False):
            yield "tls-unverified", "high", node.lineno, "host names are not checked"
        if name == "verify" and isinstance(target, ast.Attribute) and is_constant(value, False):
            yield "tls-unverified", "high", node.lineno, "TLS certificates are not checked"
        if name == "verify_mode" and value is not None and facts.origin(value) == "ssl.CERT_NONE":
            yield "tls-unverified", "high", node.lineno, "TLS certificates are not checked"
        if value is not None and _SECRET_NAME.search(name) and _uses_random(value, facts):
            yield "weak-random-secret", "medium", node.lineno, f"{name} comes from a predictable generator"


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, facts: _Facts) -> Iterator[Found]:
    if _SECRET_NAME.search(node.name):
        for returned in (n for n in ast.walk(node) if isinstance(n, ast.Return)):
            if _uses_random(returned.value, facts):
                yield "weak-random-secret", "medium", returned.lineno, f"{node.name} uses a predictable generator"


def _extractions(node: ast.AST, archives: frozenset[str], facts: _Facts) -> Iterator[Found]:
    """Extraction of unchecked members of a tar archive. `archives`: names that hold one; a `with` adds its own."""
    for child in ast.iter_child_nodes(node):
        inside = archives
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and _checks_names(child):
            continue
        if isinstance(child, ast.With):
            for item in child.items:
                name = frozenset({dotted(item.optional_vars)} if item.optional_vars is not None else ())
                inside = inside | name if facts.opens_tar(item.context_expr) else inside - name
        elif isinstance(child, ast.Call):
            owner, _, method = dotted(child.func).rpartition(".")
            opened = isinstance(child.func, ast.Attribute) and facts.opens_tar(child.func.value)
            if method in ("extract", "extractall") and (owner in archives or opened) and not _filtered(child):
                yield "archive-traversal", "high", child.lineno, "members of an archive can name any path"
        yield from _extractions(child, inside, facts)


def _filtered(call: ast.Call) -> bool:
    """Whether the members are chosen by a filter of tarfile or by a function of the program."""
    chosen, members = keyword(call, "filter"), keyword(call, "members")
    if chosen is not None:
        return not (isinstance(chosen, ast.Constant) and chosen.value == "fully_trusted")
    return isinstance(members, ast.Call) and last(members.func) != "getmembers"


def _checks_names(function: ast.AST) -> bool:
    guards = {"startswith", "realpath", "abspath", "resolve", "commonpath", "commonprefix", "is_relative_to", "isabs"}
    return any(
        (isinstance(n, ast.Call) and last(n.func) in guards) or (isinstance(n, ast.Constant) and n.value == "..")
        for n in ast.walk(function)
    )


def _renders_html(text: object) -> bool:
    return isinstance(text, str) and "{{" in text and has_markup(text)


def _unverified(node: ast.Call) -> bool:
    options = keyword(node, "options")
    off = isinstance(options, ast.Dict) and any(
        isinstance(k, ast.Constant) and k.value == "verify_signature" and is_constant(v, False)
        for k, v in zip(options.keys, options.values, strict=True)
    )
    algorithms = keyword(node, "algorithms")
    none = isinstance(algorithms, ast.List) and any(
        isinstance(e, ast.Constant) and str(e.value).lower() == "none" for e in algorithms.elts
    )
    return off or none or is_constant(keyword(node, "verify"), False)


def _is_star(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value == "*"


def _words(call: ast.Call, facts: _Facts) -> str:
    """The constant words of a command, in order."""
    command = call.args[0] if call.args else None
    if isinstance(command, ast.Name):
        command = facts.constants.get(command.id, command)
    if command is None:
        return ""
    return " ".join(n.value for n in ast.walk(command) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _target_name(target: ast.expr) -> str:
    if isinstance(target, ast.Subscript):
        return str(target.slice.value) if isinstance(target.slice, ast.Constant) else ""
    return last(target)


def _names_password(node: ast.expr) -> bool:
    return any(
        isinstance(n, ast.Name | ast.Attribute) and re.search(r"passw(?:or)?d", last(n), re.I) for n in ast.walk(node)
    )


def _uses_random(node: ast.expr | None, facts: _Facts) -> bool:
    calls = (n for n in ast.walk(node) if isinstance(n, ast.Call)) if node is not None else ()
    return any(facts.origin(c.func).startswith("random.") and last(c.func) in _RANDOM for c in calls)
