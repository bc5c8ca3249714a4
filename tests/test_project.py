"The project as a whole: notebooks and modules belong together, specs and parameters agree."
import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import house
from temp_nce.images.simclr import Recipe

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent.name in ("experiments", "benchmarks")]


def tagged(path):
    return [cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("module",
                         sorted(path for path in (ROOT / "temp_nce").rglob("*.py") if path.name != "_modidx.py"),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_names_a_notebook_that_exists(module):
    named = re.search(r"File to edit: (\S+)\.$", module.read_text(), re.MULTILINE).group(1)
    assert (module.parent / named).exists()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_notebooks_have_one_cell_of_literal_parameters(path):
    cells = tagged(path)
    assert len(cells) == 1
    for line, statement in zip(cells[0].source.splitlines(), ast.parse(cells[0].source).body):
        assert isinstance(statement, ast.Assign) and "#" in line, line
        ast.literal_eval(statement.value)


def test_pretrain_notebook_has_every_entry_of_a_recipe():
    names = {statement.targets[0].id
             for statement in ast.parse(tagged(ROOT / "nbs/experiments/pretrain.ipynb")[0].source).body}
    assert set(Recipe.__dataclass_fields__) <= names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_notebooks_are_clean_and_small(path):
    notebook = nbformat.read(path, 4)
    assert path.stat().st_size < 400_000
    for cell in notebook.cells:
        assert cell.cell_type != "code" or cell.execution_count is None
        assert all(output.output_type != "error" for output in cell.get("outputs", []))


def test_every_part_imports_only_what_lies_below_it(): assert house.violations() == []


@pytest.mark.parametrize("module, line, said", (
    ("metrics.py", "from .images.simclr import pretrain", "metrics imports images"),
    ("losses/pairs.py", "def late():\n    from temp_nce import engine", "losses imports engine"),
    ("graphs/data.py", "import temp_nce.images.data", "graphs imports images"),
    ("lab/spec.py", "import torch", "lab/spec.py imports torch"),
    ("temperature.py", "import numpy", "temperature.py imports numpy"),
    ("images/sets.py", "from ..lab import open_run", "images imports lab")))
def test_a_planted_import_is_found(module, line, said, tmp_path):
    package = Path(shutil.copytree(ROOT / "temp_nce", tmp_path / "temp_nce"))
    with open(package / module, "a") as file: file.write(f"\n{line}\n")
    assert house.violations(package) == [said]


MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "temp_nce").rglob("*.py")
                 if path.stem not in ("__init__", "_modidx"))


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_are_documented_and_typed(module):
    if module.startswith("temp_nce.graphs"): pytest.importorskip("torch_geometric")
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        thing = getattr(loaded, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
        assert thing.__doc__, f"{module}.{name}"
        if inspect.isfunction(thing):
            missing = [p for p, value in inspect.signature(thing).parameters.items()
                       if value.annotation is inspect.Parameter.empty]
            assert not missing, f"{module}.{name}: {missing}"


def test_modules_of_the_lab_are_short():
    for path in (ROOT / "temp_nce" / "lab").glob("*.py"):  # lines of code; more cells do not make a module longer
        assert sum(bool(line) and not line.startswith("# %%") for line in path.read_text().splitlines()) <= 320, path


def test_importing_loads_no_more_than_it_must():
    big = {"torch", "torchvision", "torch_geometric", "sklearn", "matplotlib", "pandas", "papermill"}
    allowed = {"temp_nce": set(), "temp_nce.lab.cli": set(), "temp_nce.losses": {"torch"}, "temp_nce.engine": {"torch"},
               "temp_nce.graphs": big - {"torchvision", "matplotlib", "papermill"}}
    for module, may in allowed.items():
        code = f"import sys, {module}; print(*({big} & {{*sys.modules}}))"
        loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                    check=True).stdout.split())
        assert loaded <= may, (module, loaded - may)


def links(path):
    "Relative links of a notebook's prose."
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    return [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)
            if not re.match(r"https?:|#|attachment:|data:", link)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_links_between_notebooks_lead_somewhere(path):
    missing = [link for link in links(path) if not (path.parent / link).exists()]
    assert not missing, missing


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_specs_name_only_temperatures_that_exist(path):
    from temp_nce.lab.spec import load_spec
    from temp_nce.losses import make_loss
    spec = load_spec(path)
    grids = [grid for scale in spec.scales for grid in spec.grids(scale)]
    named = {temperature for grid in grids for temperature in grid.get("temperature", [])}
    for temperature in named - set(spec.baselines): make_loss(str(temperature))
    for entry in spec.paper.values:
        if "temperature" in entry: assert entry["temperature"] in named


def test_ledger_lines_are_whole():
    for path in (ROOT / "data/results").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert {"id", "spec", "scale", "parameters", "metrics", "seconds", "device", "peak_memory_mib", "commit",
                    "finished", "notebook_sha256"} <= set(row)


@pytest.mark.parametrize("scale", ("smoke", "quick", "long", "paper"))
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "nbs/experiments").glob("*.yaml")))
def test_every_planned_image_run_can_begin(name, scale):
    import torch
    from temp_nce.lab import load_spec, plan
    from temp_nce.images import make_encoder, make_head
    spec = load_spec(name)
    if scale not in spec.scales: pytest.skip(f"{name} has no scale {scale}")
    for run in plan(spec, scale):
        if Path(run.spec.notebook).stem != "pretrain": continue
        recipe = Recipe(**{field: run.parameters[field] for field in Recipe.__dataclass_fields__})
        with torch.device("meta"):
            make_head(recipe.head, make_encoder(recipe.encoder, stem=recipe.stem).features, recipe.projection)
        assert recipe.knn_k <= run.parameters["train_size"] or not run.parameters["train_size"]
