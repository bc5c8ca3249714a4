"""The site: `python docs/build_site.py FOLDER` stages its sources in FOLDER/source and builds FOLDER/html with Sphinx.

Notebooks keep their place below nbs/ and their stored outputs; nothing is executed. Links that leave the site point at
the repository. API pages come from docs/api_pages.py. A file whose text did not change is not written again, so that a
second build is short. A warning of Sphinx, or a link that leads nowhere, fails the build.
"""
import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import api_pages
import nbformat

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
GIT, BRANCH = SETTINGS["DEFAULT"]["git_url"], SETTINGS["DEFAULT"]["branch"]
PARTS = (  # caption, and what stands under it: a notebook, or all of a folder; what is not there is skipped
    ("Start", ("00_first_lesson", "which_temperature")),
    ("Ground floor", ("00_temperature", "00_weights", "01_tiled", "02_checks", "09_front")),
    ("Losses", ("losses/",)),
    ("Shared rooms", ("*",)),  # every other notebook that lies in nbs/ itself
    ("Training loop", ("engine/",)), ("Images", ("images/",)), ("Graphs", ("graphs/",)), ("Anomalies", ("anomaly/",)),
    ("Text", ("text/",)), ("Recommendation", ("recommend/",)), ("Lab", ("lab/",)), ("Theory", ("theory/",)),
    ("Experiments", ("experiments/",)), ("Open questions", ("open/",)), ("Benchmarks", ("benchmarks/",)),
    ("How-to", ("howto/",)), ("Results", ("results", "report", "changelog")), ("API", ("api/index",)))
NO_COLAB = {"index", "results", "which_temperature"}  # what these tell is in their stored outputs
DROPPED = re.compile(r"^#\|\s*hide\b", re.MULTILINE)
MODULE = re.compile(r"^#\|\s*default_exp\s+([\w.]+)", re.MULTILINE)
DIRECTIVE = re.compile(r"^\s*#\|.*\n?", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
REPORT = """# The report

Every table, claim and figure that the ledger supports, on one page: <a href="ledger-report.html">open the report</a>.
`temp-nce report` makes it from `data/results/` alone; in a clone the same page lies in `figures/report.html`.

Its chapters are the experiments:

"""


def put(path: Path, text: str, written: set) -> None:
    "Write what changed, and remember the file."
    written.add(path)
    if path.exists() and path.read_text(encoding="utf-8") == text: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy(path: Path, target: Path, written: set) -> None:
    "Copy what changed, and remember the file."
    written.add(target)
    if target.exists() and target.stat().st_mtime_ns == path.stat().st_mtime_ns: return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target)


def moved(link: str, page: Path, staged: set) -> str:
    "Where a link of a page (its path in the repository) leads on the site; ValueError for one that leads nowhere."
    if re.match(r"[a-z]+:", link): return link
    place, _, anchor = link.partition("#")
    slug = re.sub(r"[^\w-]", "", anchor).lower()  # Jupyter keeps capitals and commas in the name of a heading
    if not place: return f"#{slug}"
    target = Path(os.path.normpath(page.parent / place))
    if not (ROOT / target).exists(): raise ValueError(f"{page}: the link {link} leads nowhere")
    here = Path(os.path.relpath(page, "nbs") if page.parts[0] == "nbs" else page).parent
    there = Path(os.path.relpath(target, "nbs") if target.parts[0] == "nbs" else target)
    if target == Path("CHANGELOG.md"): there = Path("changelog.md")
    if there.suffix in (".ipynb", ".md", ".png", ".svg") and str(there) in staged:
        return os.path.relpath(there, here) + (f"#{slug}" if slug else "")
    kind = "tree" if (ROOT / target).is_dir() else "blob"
    return f"{GIT}/{kind}/{BRANCH}/{target.as_posix()}" + (f"#{anchor}" if anchor else "")


def rewritten(text: str, page: Path, staged: set) -> str:
    "Markdown with its links moved; what stands in code stays."
    pieces = re.split(r"(^```.*?^```|`[^`\n]+`)", text, flags=re.MULTILINE | re.DOTALL)
    pieces[::2] = [LINK.sub(lambda found: found[1] + moved(found[2], page, staged) + found[3], piece)
                   for piece in pieces[::2]]
    return "".join(pieces)


def badge(page: str, module: str = "") -> str:
    "The line under a title: the module that the page writes, Colab, where it helps, and the notebook itself."
    source = f"[notebook]({GIT}/blob/{BRANCH}/nbs/{page}.ipynb)"
    if module: source += f" · `{SETTINGS['DEFAULT']['lib_name']}.{module.removesuffix('.__init__')}`"
    if page in NO_COLAB or page.startswith(("experiments/", "benchmarks/")): return source
    colab = f"https://colab.research.google.com/github/{GIT.split('github.com/')[1]}/blob/{BRANCH}/nbs/{page}.ipynb"
    return f"[Open in Colab]({colab}) (run `%pip install git+{GIT}` first) · {source}"


def notebook(path: Path, staged: set) -> nbformat.NotebookNode:
    "A notebook as the site shows it: without cells and lines that are nbdev's business, with links that work."
    book, page = nbformat.read(path, 4), path.relative_to(ROOT)
    found = MODULE.search("\n".join(cell.source for cell in book.cells if cell.cell_type == "code"))
    cells = []
    for cell in book.cells:
        if cell.cell_type == "markdown": cell.source = rewritten(cell.source, page, staged)
        if cell.cell_type == "code":
            if DROPPED.search(cell.source): continue
            cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
            if not cell.source and not cell.outputs: continue
        cells.append(cell)
    title, _, rest = cells[0].source.partition("\n")
    name = page.relative_to("nbs").with_suffix("").as_posix()
    cells[0].source = f"{title}\n\n{{.where}}\n{badge(name, found[1] if found else '')}\n{rest}"
    book.cells = cells
    book.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                     "language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    return book


def toctrees(pages: list[str]) -> str:
    "The reading order: every page stands under one caption."
    loose = [page for page in pages if "/" not in page and page != "index"]
    named = {name for _, names in PARTS for name in names}
    text = []
    for caption, names in PARTS:
        chosen = [page for name in names for page in pages
                  if page == name or name == "*" and page in loose and page not in named
                  or name.endswith("/") and page.startswith(name)]
        if chosen: text += [f"```{{toctree}}\n:hidden:\n:caption: {caption}\n", *chosen, "```\n"]
    return "\n".join(text)


def report(build: Path) -> Path:
    "The report page: the clone's own if it is newer than the ledger, else a new one, made beside the site."
    made, rows = ROOT / "figures/report.html", list((ROOT / "data/results").glob("*.jsonl"))
    newest = max(path.stat().st_mtime for path in rows)
    if made.exists() and made.stat().st_mtime >= newest: return made
    made = build / "home/figures/report.html"
    if not made.exists() or made.stat().st_mtime < newest:
        for folder in ("figures", "data/results"):
            shutil.copytree(ROOT / folder, build / "home" / folder, dirs_exist_ok=True)
        command = [str(Path(sys.executable).with_name("temp-nce")), "report", "--home", str(build / "home")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def mathjax(target: Path) -> None:
    "What formulas need to be drawn without a network, from the package that ships MathJax."
    source = Path(importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[0]) / "static/mathjax"
    for part in ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions"):
        for path in [source / part] if (source / part).is_file() else (source / part).rglob("*"):
            if path.is_file(): copy(path, target / path.relative_to(source), set())


def stage(build: Path) -> None:
    "Fill build/source; what else the site serves lies beside it, in extra/ and static/."
    out, written = build / "source", set()
    books = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    figures = sorted(path for ending in ("png", "svg") for path in (ROOT / "figures").glob(f"*.{ending}"))
    staged = {path.relative_to(ROOT / "nbs").as_posix() for path in books}
    pages = [path.removesuffix(".ipynb") for path in sorted(staged)] + ["report", "changelog", "api/index"]
    staged |= {path.relative_to(ROOT).as_posix() for path in figures} | {"changelog.md"}
    for path in books:
        book = notebook(path, staged)
        if path == ROOT / "nbs/index.ipynb": book.cells[-1].source += "\n\n" + toctrees(pages)
        put(out / path.relative_to(ROOT / "nbs"), nbformat.writes(book), written)
    changes = rewritten((ROOT / "CHANGELOG.md").read_text("utf-8"), Path("CHANGELOG.md"), staged)
    put(out / "changelog.md", changes, written)
    used = set(re.findall(r"figures/[\w.-]+\.(?:png|svg)", "".join(path.read_text("utf-8") for path in written)))
    for path in figures:
        if path.relative_to(ROOT).as_posix() in used: copy(path, out / "figures" / path.name, written)
    copy(made := report(build), build / "extra/ledger-report.html", set())
    chapters = re.findall(r'<h2 id="([\w-]+)">(.*?)</h2>', made.read_text("utf-8"), re.DOTALL)
    listed = [f'- <a href="ledger-report.html#{name}">{title.strip()}</a>' for name, title in chapters]
    put(out / "report.md", REPORT + "\n".join(listed) + "\n", written)
    for name, text in api_pages.pages().items(): put(out / "api" / f"{name}.md", text, written)
    mathjax(build / "static/mathjax")
    for path in out.rglob("*"):
        if path.is_file() and path not in written: path.unlink()


def main(build: Path) -> None:
    "Stage, then build."
    stage(build)
    options = ["-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT / "docs"), "-d", str(build / "trees")]
    command = [sys.executable, "-m", "sphinx", *options, str(build / "source"), str(build / "html")]
    done = subprocess.run(command, env={**os.environ, "SITE_BUILD": str(build)})
    if done.returncode: sys.exit(done.returncode)
    print(f"written: {build / 'html/index.html'}")


if __name__ == "__main__": main(Path(sys.argv[1]).resolve())
