"""API pages from the modules themselves: names in `__all__`, signatures, docstrings, and comments of arguments."""
import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

from fastcore.docments import docments

PACKAGE = Path(__file__).resolve().parent.parent / "temp_nce"
Row = tuple[str, str, str, str]  # name, type, default, comment


def plain(text: str | None) -> str:
    "A docstring as Markdown: signs outside of `code` mean themselves."
    pieces = enumerate(re.split(r"(`[^`]+`)", inspect.cleandoc(text or "")))
    return "".join(piece if odd % 2 else re.sub(r"([\\*_<\[$|])", r"\\\1", piece) for odd, piece in pieces)

def cell(text: str) -> str: return " ".join(text.split()).replace("\\|", "|").replace("|", "\\|")

def code(text: str) -> str: return f"`{text}`" if text else ""

def table(rows: list[Row]) -> list[str]:
    "Arguments with their defaults as the source writes them, and their comments."
    body = [f"| {code(name)} | {cell(code(default))} | {cell(plain(comment))} |" for name, _, default, comment in rows
            if default or comment]
    return ["", "| argument | default | comment |", "|---|---|---|", *body] if body else []

def tree(item) -> ast.AST: return ast.parse(textwrap.dedent(inspect.getsource(item))).body[0]

def fields(cls: type) -> list[Row]:
    "The fields of a dataclass or model, its bases' fields first."
    found = {}
    for base in [base for base in reversed(cls.__mro__) if base.__module__.startswith("temp_nce")]:
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        for node in tree(base).body:
            if not isinstance(node, ast.AnnAssign) or node.target.id.startswith("_"): continue
            comment = (re.search(r"\s#\s?(.*)$", lines[node.end_lineno - 1][node.end_col_offset:])
                       or re.match(r"\s*#\s?(.*)$", lines[node.lineno - 2]))
            found[node.target.id] = (node.target.id, ast.unparse(node.annotation),
                                     ast.unparse(node.value) if node.value else "", comment[1] if comment else "")
    return list(found.values())


def arguments(function) -> tuple[str, list[Row]]:
    "The signature and the arguments of a function or method."
    node, comments = tree(function), docments(inspect.unwrap(function), full=True, args_kwargs=True)
    given = node.args
    given.args = [item for item in given.args if item.arg not in ("self", "cls")]
    placed = [*given.posonlyargs, *given.args]
    pairs = [*zip(reversed(placed), reversed(given.defaults)), *zip(given.kwonlyargs, given.kw_defaults)]
    values = {item.arg: ast.unparse(value) for item, value in pairs if value}
    names = [("", item.arg) for item in [*placed, *given.kwonlyargs]]
    names += [(stars, item.arg) for stars, item in (("*", given.vararg), ("**", given.kwarg)) if item]
    said = lambda name: str((comments.get(name) or {}).get("docment") or "")
    rows = [(stars + name, "", values.get(name, ""), said(name)) for stars, name in names]
    gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(given)}){gives}", [*rows, ("return", "", "", said("return"))]


def function(name: str, item, *options: str, kind: str = "function", fence: str = "::::") -> list[str]:
    "A function, a method or a property."
    kind = "property" if isinstance(item, property) else kind
    signature, rows = ("", []) if kind == "property" else arguments(item)
    return [f"{fence}{{py:{kind}}} {name}{signature}", *options, "", plain(item.__doc__), *table(rows), fence, ""]


def klass(name: str, cls: type, *options: str) -> list[str]:
    "A class with its public methods."
    rows = fields(cls)
    head = f"({', '.join(f'{field}: {kind}' + ' = ' * bool(value) + value for field, kind, value, _ in rows)})"
    if not rows and getattr(cls.__init__, "__module__", "").startswith("temp_nce"): head, rows = arguments(cls.__init__)
    methods = [line for key, item in vars(cls).items() if not key.startswith("_")
               if isinstance(item, property) or inspect.isfunction(inspect.unwrap(item))
               for line in function(key, item, kind="method", fence=":::")]
    bases = [f"Base: {code(base.__name__)}." for base in cls.__bases__ if base is not object]
    body = [plain(cls.__doc__), "", *bases, *table(rows), "", *methods]
    return [f"::::{{py:class}} {name}{head}", *options, "", *body, "::::", ""]


def own(dotted: str, path: Path) -> dict[str, list[str]]:
    "What a module defines itself of the names in its `__all__`."
    module, text, found = importlib.import_module(dotted), path.read_text(encoding="utf-8"), {}
    sources = {target.id: ast.get_source_segment(text, node) for node in ast.parse(text).body
               if isinstance(node, (ast.Assign, ast.AnnAssign))
               for target in ast.walk(node) if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)}
    for name in getattr(module, "__all__", []):
        item, option = getattr(module, name), f":module: {dotted}"
        if name in sources:
            found[name] = [f"::::{{py:data}} {name}", option, "", "```python", sources[name], "```", "::::", ""]
        elif getattr(item, "__module__", "") == dotted:
            found[name] = (klass if inspect.isclass(item) else function)(name, item, option)
    return found


def pages() -> dict[str, str]:
    "All pages by name: an index, and one for each module with public names, its own ones first, then those handed on."
    paths = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
             for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py"}
    modules = {dotted: importlib.import_module(dotted) for dotted in sorted(paths)}
    defined = {dotted: own(dotted, paths[dotted]) for dotted in modules}
    public = [dotted for dotted, module in modules.items() if getattr(module, "__all__", [])]
    index, made = ["# API", "", "Every public name of every module.", "", "| module | |", "|---|---|"], {}
    for dotted in public:
        text = paths[dotted].read_text(encoding="utf-8")
        home = re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.$", text, re.MULTILINE)[1]
        said = plain((re.search(r'^"""(.*?)"""', text, re.MULTILINE | re.DOTALL) or ["", ""])[1])
        shown = [line for lines in defined[dotted].values() for line in lines]
        handed = [name for name in modules[dotted].__all__ if name not in defined[dotted]]
        shown += ["| name | |", "|---|---|"] * bool(handed)
        for name in handed:
            item = getattr(modules[dotted], name)
            place = next(other for other in modules if name in defined[other] and getattr(modules[other], name) is item)
            first = plain(item.__doc__ if callable(item) else "").partition("\n\n")[0]
            shown.append(f"| {{py:obj}}`{name} <{place}.{name}>` | {cell(first)} |")
        made[dotted] = "\n".join([f"# {dotted}", "", said, "", f"Explained in [{home}](../{home}).", "", *shown, ""])
        index.append(f"| [{dotted}]({dotted}.md) | {cell(said)} |")
    return {"index": "\n".join([*index, "", "```{toctree}", ":hidden:", "", *public, "```", ""]), **made}
