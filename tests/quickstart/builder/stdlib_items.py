"""What a CPython installation says about itself: short functions with their docstrings, and paragraphs of explanation.

Functions are read with `ast` from the standard library's sources; explanations come from docstrings (of the sources
and, by import, of the C modules) and from `pydoc_data.topics`. Nothing is downloaded. Another CPython version gives
another, equally usable set.
"""

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

SKIPPED_PARTS = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "idle_test", "turtledemo",
    "pydoc_data", "ensurepip", "encodings", "lib-dynload", "__phello__",
}  # fmt: skip
C_MODULES = [
    "builtins",
    "math",
    "cmath",
    "itertools",
    "functools",
    "collections",
    "operator",
    "os",
    "time",
    "re",
    "sys",
    "gc",
    "array",
    "zlib",
    "binascii",
    "struct",
    "random",
    "select",
    "socket",
    "signal",
    "mmap",
    "bisect",
    "heapq",
    "hashlib",
    "unicodedata",
    "datetime",
    "decimal",
    "json",
    "pickle",
    "csv",
    "io",
    "string",
    "threading",
    "weakref",
    "types",
    "abc",
    "contextvars",
    "faulthandler",
    "errno",
    "marshal",
    "itertools",
    "sqlite3",
    "ssl",
    "lzma",
    "bz2",
    "resource",
]
_Callable = ast.FunctionDef | ast.AsyncFunctionDef
MAX_LINES, MAX_CODE_CHARS = 25, 850
MIN_PROSE, MAX_PROSE = 80, 560


@dataclass(frozen=True)
class Function:
    """One short function: `signature` is its `def` line(s), `doc` its docstring's first paragraph, `body` the rest."""

    module: str
    name: str  # qualified: "Queue.put"
    signature: str
    doc: str
    body: str

    @property
    def head(self) -> str:
        """Signature and docstring, as a prompt shows them."""
        return self.signature + (f"\n    {self._quoted()}" if self.doc else "")

    @property
    def code(self) -> str:
        """The whole function with its docstring."""
        return self.head + "\n" + self.body

    def _quoted(self) -> str:
        lines = self.doc.splitlines()
        text = "\n    ".join(lines)
        return f'"""{text}"""' if len(lines) == 1 else f'"""{text}\n    """'


@dataclass(frozen=True)
class Explanation:
    """Paragraphs of prose about one subject; `kind` is function, method, class, module or section."""

    kind: str
    subject: str  # how a question names it, in backticks where it is code
    context: str  # the module or topic it belongs to
    paragraphs: tuple[str, ...]


def _sources() -> Iterator[tuple[str, str]]:
    """(module name, source) of the standard library's pure Python modules, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_PARTS & set(parts) or any(p.startswith(("config-", "_sysconfigdata")) for p in parts):
            continue
        try:
            source = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if source.isascii():
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), source


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | _Callable]]:
    """(qualified name, node) of the module's classes and functions, nested functions excluded."""
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        prefix, parent = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                yield prefix + node.name, node
                stack.append((f"{prefix}{node.name}.", node))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + node.name, node
            elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
                stack.append((prefix, node))


def _dedent(lines: list[str], width: int) -> str:
    return "\n".join(line[width:] if not line[:width].strip() else line for line in lines).rstrip()


def _function(module: str, name: str, node: _Callable, lines: list[str]) -> Function | None:
    """The function as an item, or None when it is long, trivial, or written so that it cannot be cut into parts."""
    if node.end_lineno is None or node.end_lineno - node.lineno + 1 > MAX_LINES or node.col_offset % 4:
        return None
    docstring = ast.get_docstring(node)
    body = node.body[1:] if docstring is not None else node.body
    if not body or body[0].lineno <= node.lineno or (len(body) == 1 and isinstance(body[0], ast.Pass)):
        return None
    first = node.body[0].lineno
    signature = _dedent(lines[node.lineno - 1 : first - 1], node.col_offset)
    start = node.body[0].end_lineno if docstring is not None else first - 1
    code = _dedent(lines[start : node.end_lineno], node.col_offset).lstrip("\n")
    doc = _first_paragraph(docstring or "")
    if not signature.rstrip().endswith(":") or not code.startswith("    ") or '"""' in doc or "\t" in code:
        return None
    if len(signature) + len(code) > MAX_CODE_CHARS or len(code) < 20 or "\\" in doc:
        return None
    return Function(module, name, signature, doc, code)


def _first_paragraph(docstring: str) -> str:
    paragraph = docstring.strip().split("\n\n")[0]
    lines = [line.strip() for line in paragraph.splitlines()]
    return "\n".join(lines) if len(lines) <= 4 and len(paragraph) <= 280 else ""


def library_items() -> tuple[list[Function], list[Explanation]]:
    """Every short function of the standard library, and every explanation, each text once."""
    functions, documented = dict[str, Function](), list[Explanation | None]()
    for module, source in _sources():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
        lines = source.splitlines()
        documented.append(_explanation("module", f"`{module}`", "", ast.get_docstring(tree) or ""))
        for name, node in _definitions(tree):
            item = None if isinstance(node, ast.ClassDef) else _function(module, name, node, lines)
            if item is not None:
                functions.setdefault(item.code, item)
            documented.append(_documented(module, name, node))
    explanations = dict[tuple[str, ...], Explanation]()
    for item in (*_topic_explanations(), *documented, *_compiled_explanations()):
        if item is not None and item.context != "sys.builtin":
            explanations.setdefault(item.paragraphs, item)
    return list(functions.values()), list(explanations.values())


def prose(text: str) -> tuple[str, ...]:
    """The readable paragraphs of a docstring or topic: reflowed, without tables, grammars, examples and headings."""
    kept = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text.expandtabs())):
        lines = block.splitlines()
        if not block.isascii() or any(
            line.startswith((" ", ">>>", "+-", "|", "==", "--", "@", "**", ":")) for line in lines
        ):
            continue
        joined = " ".join(" ".join(lines).split())
        if (
            len(joined) < 30
            or joined[-1] not in ".:!?)"
            or re.search(r"[=|*_-]{4}|::|\bPEP\b.*\bPEP\b|\[\d+\]", joined)
        ):
            continue
        kept.append(joined if joined[-1] != ":" else joined[:-1] + ".")
    return tuple(kept)


def _explanation(kind: str, subject: str, context: str, docstring: str) -> Explanation | None:
    paragraphs = prose(docstring)
    return Explanation(kind, subject, context, paragraphs) if sum(map(len, paragraphs)) >= MIN_PROSE else None


def _documented(module: str, name: str, node: ast.ClassDef | _Callable) -> Explanation | None:
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    kind = "class" if isinstance(node, ast.ClassDef) else "method" if "." in name else "function"
    return _explanation(kind, f"`{name}`" if kind == "method" else f"`{module}.{name}`", module, docstring)


def _compiled_explanations() -> Iterator[Explanation | None]:
    """Docstrings only an import can reach; platforms without a module simply have fewer."""
    for module_name in dict.fromkeys(C_MODULES):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or inspect.ismodule(value):
                continue
            full = name if module_name == "builtins" else f"{module_name}.{name}"
            if inspect.isbuiltin(value) or inspect.isclass(value):
                kind = "class" if inspect.isclass(value) else "function"
                yield _explanation(
                    kind, f"`{full}`", module_name, value.__doc__ if isinstance(value.__doc__, str) else ""
                )
            if inspect.isclass(value) and value.__flags__ & (1 << 9) == 0:  # a static type, written in C
                for attribute, member in sorted(vars(value).items()):
                    if (
                        inspect.ismethoddescriptor(member)
                        and not attribute.startswith("_")
                        and isinstance(member.__doc__, str)
                    ):
                        yield _explanation("method", f"`{name}.{attribute}`", module_name, member.__doc__)


def _code_quotes(text: str) -> str:
    """pydoc's plain-text topics write code as "x"; here it is `x`."""
    return re.sub(
        r'"([^"\n]{1,40})"', r"`\1`", text.replace("’", "'").replace("“", "'").replace("”", "'").replace("—", "-")
    )


def _topic_explanations() -> Iterator[Explanation | None]:
    """Topics cut at their headings, then into pieces of about one answer each."""
    for text in topics.topics.values():
        parts = re.split(r"(?m)^(\S.*)\n[*=~^+-]{4,}\n", text)
        title = _code_quotes(parts[1]) if len(parts) > 1 else ""
        for heading, section in zip(parts[1::2], parts[2::2], strict=True):
            piece: list[str] = []
            for paragraph in (*prose(_code_quotes(section)), ""):
                if piece and (not paragraph or sum(map(len, piece)) + len(paragraph) > MAX_PROSE):
                    yield _explanation(
                        "section", _code_quotes(heading).rstrip("."), title.rstrip("."), "\n\n".join(piece)
                    )
                    piece = []
                piece.append(paragraph)


def python_version() -> str:
    """The CPython version whose library was read, for the model card."""
    return ".".join(map(str, sys.version_info[:3]))
