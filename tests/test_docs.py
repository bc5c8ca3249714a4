"The site: it builds without a warning, every notebook and public name is in it, every link leads somewhere."
import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

pytest.importorskip("sphinx", reason="the site needs the extra docs, which needs Python 3.11 or later")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]  # one worker builds the site, once

ROOT = Path(__file__).parent.parent
BOOKS = sorted(path.relative_to(ROOT / "nbs").with_suffix("").as_posix() for path in (ROOT / "nbs").rglob("*.ipynb")
               if ".ipynb_checkpoints" not in path.parts)
sys.path.insert(0, str(ROOT / "docs"))
build_site = importlib.import_module("build_site")


class Page(HTMLParser):
    "What a page links to, what it loads, and the places in it that a link can name."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get("id"), attrs.get("name")} - {None}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if attrs.get("src"): self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("href"): self.loads.append(attrs["href"])


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "A site built from nothing, once for all workers of pytest-xdist."
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "site"
    with FileLock(f"{shared}.lock"):
        if not (shared / "done").exists():
            command = [sys.executable, str(ROOT / "docs/build_site.py"), str(shared)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            (shared / "done").write_text(json.dumps([done.returncode, done.stdout + done.stderr]))
    code, said = json.loads((shared / "done").read_text())
    assert code == 0 and "warning" not in said.lower() and "Duplicate" not in said, said
    return shared / "html"


@pytest.fixture(scope="session")
def pages(site): return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def dead(pages, site):
    "Links and loaded files of the site that lead nowhere in it, as (page, link)."
    found = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme: continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            if target.is_dir(): target /= "index.html"
            key = Path(os.path.normpath(target)).relative_to(site).as_posix()
            named = parts.fragment and key in pages and unquote(parts.fragment) not in pages[key].ids
            if not target.is_file() or named: found.append((name, link))
    return found


def test_every_notebook_has_a_page_that_the_sidebar_names(pages):
    assert len(BOOKS) > 50
    linked = {link.partition("#")[0] for link in pages["index.html"].links} | {"index.html"}
    assert {f"{book}.html" for book in BOOKS} <= linked & set(pages)


def test_every_link_leads_somewhere(pages, site): assert dead(pages, site) == []


def test_a_dead_link_is_found(pages, site):
    planted = {**pages, "index.html": Page(site / "index.html")}
    planted["index.html"].links += ["nowhere.html", "results.html#nowhere", "report.html"]
    assert dead(planted, site) == [("index.html", "nowhere.html"), ("index.html", "results.html#nowhere")]


def foreign(pages):
    "What pages load from another host, as (page, address)."
    return [(name, link) for name, page in pages.items() for link in page.loads if re.match(r"(https?:)?//", link)]


def test_nothing_is_loaded_from_another_host(pages, site, tmp_path):
    assert foreign(pages) == []
    (tmp_path / "planted.html").write_text('<script async="async" src="https://cdn.example/mathjax.js"></script>')
    assert foreign({"planted.html": Page(tmp_path / "planted.html")}) == [
        ("planted.html", "https://cdn.example/mathjax.js")]
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path


def test_formulas_have_mathjax_and_its_fonts_in_the_site(pages, site):
    assert any("mathjax/tex-chtml.js" in link for link in pages["losses/00_pairs.html"].loads)
    assert list((site / "_static/mathjax/output/chtml/fonts/woff-v2").glob("*.woff"))


def test_search_has_an_index_with_words_of_the_lessons_and_the_api(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert "losses/00_pairs" in index and '"nt_xent"' in index and "dystress" in index
    assert (site / "search.html").exists()


def test_every_public_name_has_its_place_with_its_arguments(pages, site):
    import temp_nce
    for name in temp_nce.__all__:
        home = getattr(temp_nce, name).__module__
        assert f"{home}.{name}" in pages[f"api/{home}.html"].ids, name
    text = (site / "api/temp_nce.losses.pairs.html").read_text(encoding="utf-8")
    for comment in ("row i of z1 is the positive of row i of z0", "rows of the similarity matrix held at a time"):
        assert comment in text
    assert "../losses/00_pairs.html" in pages["api/temp_nce.losses.pairs.html"].links


def test_code_is_shown_without_nbdev_lines(site):
    shown = (site / "losses/00_pairs.html").read_text(encoding="utf-8")
    assert "#|" not in re.sub(r"<[^>]+>", "", shown) and "NTXentLoss" in shown


def test_the_report_stands_in_the_site(pages, site):
    assert "ledger-report.html" in pages["report.html"].links
    assert all(f"ledger-report.html#{path.stem}" in pages["report.html"].links
               for path in (ROOT / "data/results").glob("*.jsonl") if path.stem in pages["ledger-report.html"].ids)


def test_lessons_and_howtos_open_in_colab(pages):
    for book in ("00_first_lesson", "howto/drop_in"):
        assert any(link.startswith("https://colab.") and link.endswith(f"nbs/{book}.ipynb")
                   for link in pages[f"{book}.html"].links)


@pytest.mark.parametrize("link, page, moved", (
    ("../figures/theory-one-family.png", "nbs/theory/one_family.ipynb", "../figures/theory-one-family.png"),
    ("../figures/theory-one-family.png", "nbs/index.ipynb", "figures/theory-one-family.png"),
    ("../nbs/losses/00_pairs.ipynb#use", "nbs/index.ipynb", "losses/00_pairs.ipynb#use"),
    ("../data/results", "nbs/results.ipynb", "GIT/tree/main/data/results"),
    ("experiments/digits.yaml", "nbs/results.ipynb", "GIT/blob/main/nbs/experiments/digits.yaml"),
    ("https://arxiv.org", "nbs/results.ipynb", "https://arxiv.org")))
def test_links_are_moved(link, page, moved):
    staged = {"figures/theory-one-family.png", "losses/00_pairs.ipynb"}
    if page == "nbs/theory/one_family.ipynb": link = f"../{link}"
    assert build_site.moved(link, Path(page), staged) == moved.replace("GIT", build_site.GIT)


def test_a_link_of_a_notebook_that_leads_nowhere_is_refused():
    with pytest.raises(ValueError, match="nbs/index.ipynb: the link nowhere.ipynb leads nowhere"):
        build_site.rewritten("see [this](nowhere.ipynb)", Path("nbs/index.ipynb"), set())
    assert build_site.rewritten("`[this](nowhere.ipynb)`", Path("nbs/index.ipynb"), set()) == "`[this](nowhere.ipynb)`"
