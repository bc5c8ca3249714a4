"""Sphinx settings of the site; docs/build_site.py stages the sources and calls Sphinx."""
import configparser
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = Path(os.environ["SITE_BUILD"])  # where docs/build_site.py puts what it stages
settings = configparser.ConfigParser()
settings.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author = settings["title"], settings["author"]
project_copyright = settings["copyright"]
version = release = settings["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax"]
mathjax_path = "mathjax/tex-chtml.js"  # staged, so that formulas need no network
nb_execution_mode = "off"  # stored outputs are the evidence
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # no widgets, and nothing from another host
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 4
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
add_module_names = False
suppress_warnings = ["ref.python"]  # two modules may use one name for a type; an annotation then links to the first
smartquotes = False  # quotes in comments of arguments are Python's

html_theme = "furo"
html_title = project
html_static_path = ["static", str(BUILD / "static")]
html_extra_path = [str(BUILD / "extra")]
html_css_files = ["site.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
