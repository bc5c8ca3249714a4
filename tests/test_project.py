"The project as a whole: notebooks and modules belong together, specs and parameters agree."
import ast
import inspect
import json
import re
from pathlib import Path

import nbformat
import pytest

from temp_nce.images.simclr import Recipe

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent.name in ("experiments", "benchmarks")]


def tagged(path): return [cell for cell in nbformat.read(path, 4).cells if "parameters" in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("module", sorted((ROOT / "temp_nce").glob("[a-z]*.py")), ids=lambda path: path.stem)
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
    names = {statement.targets[0].id for statement in ast.parse(tagged(ROOT / "nbs/experiments/pretrain.ipynb")[0].source).body}
    assert set(Recipe.__dataclass_fields__) <= names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_notebooks_are_clean_and_small(path):
    notebook = nbformat.read(path, 4)
    assert path.stat().st_size < 400_000
    for cell in notebook.cells:
        assert cell.cell_type != "code" or cell.execution_count is None
        assert all(output.output_type != "error" for output in cell.get("outputs", []))


def test_modules_import_only_what_stands_above_them():
    order = ["style", "temperature", "tiled", "losses", "metrics", "data", "augment", "models", "training"]
    for rank, name in enumerate(order):
        used = set(re.findall(r"^from temp_nce\.(\w+) import", (ROOT / f"temp_nce/{name}.py").read_text(), re.MULTILINE))
        assert used <= set(order[:rank]), (name, used)


def test_public_functions_are_documented_and_typed():
    import importlib
    for module in ("temperature", "tiled", "losses", "metrics", "data", "augment", "models", "training", "experiment", "report", "style", "graph"):
        loaded = importlib.import_module(f"temp_nce.{module}")
        for name in loaded.__all__:
            thing = getattr(loaded, name)
            if not (inspect.isfunction(thing) or inspect.isclass(thing)): continue
            assert thing.__doc__, f"{module}.{name}"
            if inspect.isfunction(thing):
                missing = [p for p, value in inspect.signature(thing).parameters.items() if value.annotation is inspect.Parameter.empty]
                assert not missing, f"{module}.{name}: {missing}"


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_specs_name_only_temperatures_that_exist(path):
    from temp_nce.lab.experiment import load_spec
    from temp_nce.losses import make_loss
    spec = load_spec(path)
    grids = [grid for scale in spec.scales for grid in spec.grids(scale)]
    named = {temperature for grid in grids for temperature in grid.get("temperature", [])}
    for temperature in named: make_loss(str(temperature))
    for entry in spec.paper.get("values", []):
        if "temperature" in entry: assert entry["temperature"] in named


def test_ledger_lines_are_whole():
    for path in (ROOT / "data/results").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            assert {"id", "spec", "scale", "parameters", "metrics", "seconds", "device", "peak_memory_mib", "commit", "finished", "notebook_sha256"} <= set(row)


@pytest.mark.parametrize("scale", ("smoke", "quick", "paper"))
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "nbs/experiments").glob("*.yaml")))
def test_every_planned_image_run_can_begin(name, scale):
    import torch
    from temp_nce.lab.experiment import load_spec, plan
    from temp_nce.images.models import make_encoder, make_head
    for run in plan(load_spec(name), scale):
        if Path(run.spec.notebook).stem != "pretrain": continue
        recipe = Recipe(**{field: run.parameters[field] for field in Recipe.__dataclass_fields__})
        with torch.device("meta"): make_head(recipe.head, make_encoder(recipe.encoder, stem=recipe.stem).features, recipe.projection)
        assert recipe.knn_k <= run.parameters["train_size"] or not run.parameters["train_size"]
