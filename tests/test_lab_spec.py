"""Specs and plans: what is refused in one line, what a run is called, and that recorded runs keep their names."""
import shlex
from pathlib import Path

import papermill
import pytest
from hypothesis import given, settings, strategies as st

from lab_toys import PARAMETERS, SPEC, make_lab, write_notebook
from temp_nce.lab.cli import _pairs
from temp_nce.lab.run import notebook_parameters, plan, run_id, value_text
from temp_nce.lab.spec import Paper, find_specs, load_spec

@pytest.fixture
def lab(tmp_path) -> Path: return make_lab(tmp_path)


@pytest.mark.parametrize("old, new, message", [
    ("fixed:", "fixd:", "unknown key fixd; did you mean fixed?"),
    ("title: A toy\n", "", "the key title is missing"),
    ("quick: {about", "quik: {about", "unknown key quik; did you mean quick?"),
    ("quick: {about: four", "quick: {abuot: four", "unknown key abuot; did you mean about?"),
    ("seed: [0, 1]", "seed: 3", "seed: expected a list of values, got 3"),
    ("score: {percent: true}", "score: {per_cent: true}", "unknown key per_cent; did you mean percent?"),
    ("score: [50, 1]", "scor: [50, 1]", "unknown key scor; did you mean score?"),
    ("score: [50, 1]", "score: high", "score: expected a mean or [mean, std]"),
    ("score: [50, 1]", "score: [1, 2, 3]", "score: expected a mean or [mean, std]"),
    ("{temperature: 0.5, score", "{score", "the key temperature is missing"),
    ("seed: [0]}}", "sed: [0]}}", "unknown key sed; did you mean seed?"),
    ("curves: [loss]", "main: scores", "scores is not a metric; did you mean score?"),
    ("curves: [loss]", "threads: 0", "threads: expected a whole number above 0, got 0"),
    ("title: A toy", "title: [A", "not valid YAML"),
])
def test_a_wrong_spec_is_refused_in_one_line(lab, old, new, message):
    assert old in SPEC
    (lab / "toy.yaml").write_text(SPEC.replace(old, new))
    with pytest.raises(ValueError) as error: load_spec(lab / "toy.yaml")
    assert message in str(error.value) and "toy.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scale, overrides, message", [
    ("quck", {}, "unknown scale quck; did you mean quick?"),
    ("quick", {"temprature": ["free"]}, "unknown parameter temprature; did you mean temperature?"),
    ("quick", {"steps": [2.5]}, "steps: expected int"),
    ("quick", {"steps": [True]}, "steps: expected int"),
    ("quick", {"fast": ["maybe"]}, "fast: expected bool"),
    ("quick", {"lr": ["high"]}, "lr: expected float"),
    ("quick", {"lr": [float("inf")]}, "lr: expected float"),
    ("quick", {"temperature": [True]}, "temperature: expected str"),
    ("quick", {"run_dir": ["/tmp"]}, "run_dir is set by the runner"),
])
def test_a_wrong_parameter_is_refused_before_anything_runs(lab, scale, overrides, message):
    with pytest.raises(ValueError) as error: plan(load_spec(lab / "toy.yaml"), scale, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("parameters, message", [
    (PARAMETERS + "extra = 1 + seed\n", "may hold only name = literal, not extra = 1 + seed"),
    (PARAMETERS + "import os\n", "may hold only name = literal, not import os"),
    (PARAMETERS.replace("run_dir", "folder"), "has no run_dir"),
])
def test_a_parameters_cell_holds_literals_and_what_the_runner_sets(lab, parameters, message):
    write_notebook(lab / "toy.ipynb", parameters)
    with pytest.raises(ValueError) as error: notebook_parameters(lab / "toy.ipynb")
    assert message in str(error.value)


def test_the_parameters_cell_is_read_as_papermill_reads_it(lab):
    repository = [spec.notebook for spec in map(load_spec, find_specs())]
    for notebook in (lab / "toy.ipynb", *dict.fromkeys(repository)):
        assert list(notebook_parameters(notebook)) == list(papermill.inspect_notebook(notebook)), notebook


def test_later_sources_of_a_parameter_win(lab):
    spec = load_spec(lab / "toy.yaml")
    steps = lambda scale, sets: {run.parameters["steps"] for run in plan(spec, scale, sets)}
    assert steps("quick", {}) == {4} and steps("paper", {}) == {9}  # fixed < scale < --set
    assert steps("paper", {"steps": [11]}) == {11}
    assert {run.parameters["lr"] for run in plan(spec, "quick")} == {0.1}  # the notebook's default
    assert [run.label for run in plan(spec, "smoke")] == ["temperature=free seed=0"]
    both = plan(spec, "quick", {"temperature": [0.1, "0.25"], "seed": [5]})  # several values of one name: an axis
    assert [run.label for run in both] == ["temperature=0.1 seed=5", "temperature=0.25 seed=5"]
    assert all(run.overrides for run in both)


def test_ids_do_not_depend_on_the_order_of_lines_nor_on_how_a_number_is_written(lab):
    ids = [run.id for run in plan(load_spec(lab / "toy.yaml"), "quick")]
    assert len(set(ids)) == 4 and all(len(each) == 12 for each in ids)
    (lab / "toy.yaml").write_text(SPEC.replace("[0.5, free]", '["0.50", free]'))
    assert [run.id for run in plan(load_spec(lab / "toy.yaml"), "quick")] == ids
    moved = "\n".join(reversed(PARAMETERS.strip().splitlines()))
    write_notebook(lab / "toy.ipynb", moved.replace("lr = 0.1", "lr = 1e-1"))
    assert sorted(run.id for run in plan(load_spec(lab / "toy.yaml"), "quick")) == sorted(ids)
    write_notebook(lab / "toy.ipynb", PARAMETERS.replace("lr = 0.1", "lr = 0.2"))  # a default decides the result too
    assert not set(ids) & {run.id for run in plan(load_spec(lab / "toy.yaml"), "quick")}


def test_the_command_of_a_run_makes_that_run(lab):
    spec = load_spec(lab / "toy.yaml")
    for run in plan(spec, "paper", {"temperature": ["dystress(0.1,0.2)", 0.5], "lr": ["1e-3"]}):
        words = shlex.split(run.command(lab))
        assert words[:5] == ["temp-nce", "run", "toy.yaml", "--scale", "paper"]
        assert [again.id for again in plan(spec, "paper", _pairs(words[6::2], "--set"))] == [run.id]


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-10**30, 10**30)))
def test_a_number_has_one_text(number):
    text = value_text(number)
    assert value_text(text) == text and value_text(str(number)) == text and float(text) == float(number)


VALUES = st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.floats(allow_nan=False))


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=6), st.randoms())
@settings(max_examples=50)
def test_an_id_is_blind_to_order_and_to_nothing_else(parameters, random):
    shuffled = list(parameters.items())
    random.shuffle(shuffled)
    assert run_id("a.ipynb", dict(shuffled)) == run_id("a.ipynb", parameters) != run_id("b.ipynb", parameters)
    assert run_id("a.ipynb", parameters | {"one more": 1}) != run_id("a.ipynb", parameters)


def test_every_spec_of_the_repository_can_be_planned():
    if not find_specs(): pytest.skip("the repository has no specs yet")
    for name in find_specs():
        spec = load_spec(name)
        ids = {scale: [run.id for run in plan(spec, scale)] for scale in spec.scales}
        assert all(len(set(each)) == len(each) > 0 for each in ids.values()), name


def test_include_adds_settings_with_other_values_of_some_axes(lab):
    text = SPEC.replace("paper: {parameters: {steps: 9}}",
                        "paper: {parameters: {steps: 9}, include: [{temperature: [1, 0.5], seed: [5]}]}")
    (lab / "toy.yaml").write_text(text)
    spec = load_spec(lab / "toy.yaml")
    labels = [run.label for run in plan(spec, "paper")]
    assert (labels[-2:] == ["temperature=1 seed=5", "temperature=0.5 seed=5"] and len(labels) == 6
            and len(plan(spec, "quick")) == 4)
    # a point of the grids
    assert [run.overrides for run in plan(spec, "paper", {"temperature": ["1"], "seed": ["5"]})] == [{}]
    assert plan(spec, "paper", {"temperature": ["1"], "seed": ["0"]})[0].overrides  # not one
    # with its own seeds
    assert [run.label for run in plan(spec, "paper", {"temperature": ["1"]})] == ["temperature=1 seed=5"]
    assert len(plan(spec, "paper", {"temperature": ["0.5"]})) == 3 and len(plan(spec, "paper", {"lr": ["7"]})) == 6


def test_a_spec_that_extends_another_takes_what_it_does_not_say(lab):
    (lab / "kin.yaml").write_text("title: Kin\nextends: toy\nfixed: {lr: 0.5}\nscales: {quick: {grid: {seed: [7]}}}\n")
    kin = load_spec(lab / "kin.yaml")
    assert (kin.title == "Kin" and kin.fixed == {"steps": 4, "lr": 0.5} and kin.curves == ["loss"]
            and kin.paper == Paper())
    assert [run.label for run in plan(kin, "quick")] == ["temperature=0.5 seed=7", "temperature=free seed=7"]
    assert plan(kin, "paper")[0].parameters["steps"] == 9 and kin.scales["quick"].about == "four runs"


@pytest.mark.parametrize("text, message", [
    ("title: Kin\nextends: tou\n", "extends: there is no other spec tou.yaml"),
    ("title: Kin\nextends: kin\n", "extends: there is no other spec kin.yaml"),
    ("title: Kin\nextends: toy\nscales: {quick: {include: {seed: [1]}}}\n", "include: expected a list"),
    ("title: Kin\nextends: toy\nscales: {quick: {include: [{sed: [1]}]}}\n", "unknown key sed; did you mean seed?"),
    ("title: Kin\nextends: toy\npaired: [{question: Why, metric: scor, against: constant}]\n",
     "scor is not a metric; did you mean score?"),
    ("title: Kin\nextends: toy\npaired: [{question: Why, metric: score}]\n", "the key against is missing")])
def test_wrong_relations_between_specs_are_refused(lab, text, message):
    (lab / "kin.yaml").write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")): load_spec(lab / "kin.yaml")
