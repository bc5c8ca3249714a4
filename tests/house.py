"""The house: which part of the package may import which, read from the modules themselves.

`python tests/house.py` prints every part with what it imports, and fails when a part imports from above. The
contributor's page (nbs/howto/contributing.ipynb) draws the same.
"""
import ast
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "temp_nce"
GROUND = {"weights", "temperature", "tiled", "losses"}
SHARED = {"files", "sources", "metrics", "engine", "style", "show"}
EVERYBODY = {"checks"}  # what every part may import
MAY = {  # part -> further parts of the package that it may import
    "checks": set(), "weights": set(), "temperature": {"weights"}, "tiled": {"temperature", "weights"},
    "losses": {"temperature", "tiled"},
    "files": set(), "sources": {"files"}, "metrics": set(), "style": {"files"}, "engine": {"losses", "files"},
    "show": {"metrics", "style", "files"},
    "images": GROUND | SHARED, "graphs": GROUND | SHARED, "anomaly": GROUND | SHARED | {"images"},
    "text": GROUND | SHARED, "recommend": GROUND | SHARED,
    "lab": {"style", "files"},
    "__init__": GROUND | {"metrics"}}
STANDARD = set(sys.stdlib_module_names)
ONLY = {  # part -> the only libraries beside the standard one; parts that are not here are free
    "checks": set(),
    "weights": {"torch"}, "temperature": {"torch"}, "tiled": {"torch"}, "losses": {"torch"}, "files": set(),
    "sources": {"tqdm"}, "__init__": set()}
NEVER = {"lab": {"torch", "torchvision", "torch_geometric", "transformers"}}  # part -> libraries that it must not load
LAZY = {("lab", "torch")}  # asked for inside a function, where a GPU is looked for


def part_of(path: Path, package: Path = PACKAGE) -> str:
    "The part that a module file belongs to."
    place = path.relative_to(package).parts
    return place[0].removesuffix(".py")


def imports(path: Path, package: Path = PACKAGE) -> set[tuple[str, bool]]:
    "What a module imports, anywhere in it: dotted names, and whether the import stands at the top of the module."
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))}
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            top -= {id(node) for node in ast.walk(function)}
    inside = ["temp_nce", *path.relative_to(package).parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {(alias.name, id(node) in top) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[:len(inside) - node.level]) if node.level else ""
            name = ".".join(filter(None, [base, node.module or ""]))
            bare = name == "temp_nce"  # from . import metrics
            found |= {(f"{name}.{alias.name}" if bare else name, id(node) in top) for alias in node.names}
    return found


def arrows(package: Path = PACKAGE) -> set[tuple[str, str]]:
    "Which part imports which."
    found = set()
    for path in sorted(package.rglob("*.py")):
        if path.name == "_modidx.py": continue
        names = [name.split(".") for name, _ in imports(path, package)]
        inner = {name[1] for name in names if name[0] == "temp_nce" and len(name) > 1 and name[1] != "__version__"}
        found |= {(part_of(path, package), other) for other in inner if other != part_of(path, package)}
    return found


def violations(package: Path = PACKAGE) -> list[str]:
    "Imports that the house does not allow, as sentences."
    said = [f"{part} imports {other}" for part, other in sorted(arrows(package))
            if other not in MAY.get(part, set()) | EVERYBODY]
    for path in sorted(package.rglob("*.py")):
        part = part_of(path, package)
        for name, top in sorted(imports(path, package)):
            library = name.split(".")[0]
            if library in STANDARD or library == "temp_nce": continue
            alone, never = part in ONLY and library not in ONLY[part], library in NEVER.get(part, ())
            if alone or never and not (not top and (part, library) in LAZY):
                said.append(f"{path.relative_to(package)} imports {library}")
    return said


if __name__ == "__main__":
    for part in MAY: print(f"{part:12s} {', '.join(sorted(other for one, other in arrows() if one == part)) or '–'}")
    wrong = violations()
    print("\n".join(wrong) or "every part imports only what lies below it")
    sys.exit(bool(wrong))
