"""The notebooks as a course, in figures: how long the cells are, and how much of the code teaches.

`python tests/course.py` prints them, and fails where a bound is broken. A lesson line is a line of code that is run and
shown, and not exported. Blank lines, `#|` directives and nbdev's own calls count as neither. `--each` adds a line for
every notebook.
"""
import json
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
MAX_EXPORT, MAX_MEDIAN, MAX_PROSE, MAX_LINE, MIN_LESSON = 45, 14, 180, 120, 0.6


@dataclass
class Notebook:
    "What one notebook holds. Lengths are lines of code, and words of prose."
    name: str
    module: bool = False                              # does it export anything?
    export: list[int] = field(default_factory=list)   # lines of every exported cell
    lesson: int = 0                                   # lines of its lesson cells together
    prose: list[int] = field(default_factory=list)    # words of every prose cell
    broken: list[str] = field(default_factory=list)   # what is over a bound


def code_lines(source: str) -> int:
    "Lines of code, without blank lines and directives."
    return sum(bool(line.strip()) and not line.startswith("#|") for line in source.splitlines())


def read(path: Path, root: Path = NBS) -> Notebook:
    "Measure one notebook."
    found = Notebook(str(path.relative_to(root)))
    for place, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source, where = "".join(cell["source"]), f"{found.name}[{place}]"
        longest = max(map(len, source.splitlines()), default=0)
        if longest > MAX_LINE: found.broken.append(f"{where}: a line of {longest} characters")
        if cell["cell_type"] == "markdown":
            found.prose.append(len(source.split()))
            if found.prose[-1] > MAX_PROSE: found.broken.append(f"{where}: {found.prose[-1]} words of prose")
            if "\n% " in source: found.broken.append(f"{where}: a line begins with %, a comment to the site's Markdown")
            if re.search(r"(?m)^(?![ \d*-]).+\n\d+\. ", source):
                found.broken.append(f"{where}: a line of a paragraph begins with a number and a point, as lists do")
        elif cell["cell_type"] == "code":
            if source.startswith("#| default_exp"): found.module = True
            elif source.startswith("#| export"):
                found.export.append(code_lines(source))
                if found.export[-1] > MAX_EXPORT: found.broken.append(f"{where}: {found.export[-1]} exported lines")
            elif "nbdev_export()" not in source: found.lesson += code_lines(source)
    return found


def course(root: Path = NBS) -> list[Notebook]:
    "All notebooks in reading order of their names."
    return [read(path, root) for path in sorted(root.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def figures(books: list[Notebook]) -> dict[str, tuple[float, float, bool]]:
    "Figure, bound, and whether it holds."
    cells = [n for book in books for n in book.export]
    exported, lesson = sum(cells), sum(book.lesson for book in books)
    inside = sum(book.lesson for book in books if book.module)
    median = statistics.median(cells)
    return {
        "median lines of an exported cell": (median, MAX_MEDIAN, median <= MAX_MEDIAN),
        "longest exported cell": (max(cells), MAX_EXPORT, max(cells) <= MAX_EXPORT),
        "lesson lines per exported line": (lesson / exported, MIN_LESSON, lesson >= MIN_LESSON * exported),
        "… in the notebooks that export": (inside / exported, 0, True),
        "words of the longest prose cell": (max(n for book in books for n in book.prose), MAX_PROSE,
                                            all(n <= MAX_PROSE for book in books for n in book.prose))}


def main(each: bool = False) -> int:
    "Print the figures; 1 where a bound is broken."
    books = course()
    if each:
        for book in books:
            share = f"{book.lesson / sum(book.export):5.2f}" if book.export else "    -"
            print(f"{book.name:40} exported {sum(book.export):4}  lesson {book.lesson:4}  {share}")
    found = figures(books)
    for name, (value, bound, holds) in found.items():
        wanted = f"(bound {bound:g})" if bound else ""
        print(f"{name:36} {value:6.4g} {wanted:12} {'' if holds else 'BROKEN'}".rstrip())
    broken = [line for book in books for line in book.broken]
    print(*broken, sep="\n", end="\n" if broken else "")
    return int(bool(broken) or not all(holds for _, _, holds in found.values()))


if __name__ == "__main__":
    sys.exit(main("--each" in sys.argv[1:]))
