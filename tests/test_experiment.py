"""The runner, on toy notebooks: grids, ids, the ledger, failures, and what survives kill -9."""
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from hypothesis import given, settings, strategies as st

from temp_nce.lab.cli import _overrides
from temp_nce.lab.experiment import (RUNTIME, Ledger, _curves, _duration, _git, _Lock, _resolve_device, execute,
                                 find_home, find_row, find_specs, ledger_row, load_spec, notebook_parameters, plan,
                                 repeat, run_id, value_text, share)

PARAMETERS = '''
temperature = "0.5"  # a text
steps = 3  # a whole number
lr = 0.1  # a number
fast = True
seed = 0
device = "cpu"
run_dir = ""
'''
# Each step hashes the last state, so the end depends on every step; `steps.txt` counts the steps that were really made.
BODY = '''
import hashlib, json, os, time
from pathlib import Path
from temp_nce.lab.experiment import open_run, finish_run
run = open_run(run_dir)
if temperature == "broken": raise ValueError("temperature: broken is not known\\nsecond line")
checkpoint = run / "checkpoint.json"
step, state = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, f"{temperature} {seed}")
print("from step", step, flush=True)
while step < steps:
    step, state = step + 1, hashlib.sha256(state.encode()).hexdigest()
    if not fast: time.sleep(0.2)
    with open(run / "history.jsonl", "a") as file: file.write(json.dumps({"epoch": step, "loss": 1 / step}) + "\\n")
    with open(run / "steps.txt", "a") as file: file.write(f"{step}\\n")
    part = run / "part"
    part.write_text(json.dumps([step, state]))
    part.replace(checkpoint)
'''
END = '''
finish_run(run, {"score": int(state[:8], 16) / 2**32, "constant": float(Path("constant.txt").read_text()),
                 "threads": int(os.environ["OMP_NUM_THREADS"]), "in_test": int("IN_TEST" in os.environ)})
'''
LATE = 'if temperature == "late": raise RuntimeError("after the metrics")'
SPEC = '''
title: A toy
notebook: toy.ipynb
fixed: {steps: 4}
grid:
  temperature: [0.5, free]
  seed: [0, 1]
scales:
  smoke: {grid: {temperature: [free], seed: [0]}}
  quick: {about: four runs}
  paper: {parameters: {steps: 9}}
metrics:
  score: {percent: true}
  constant: {}
curves: [loss]
paper:
  values:
    - {temperature: 0.5, score: [50, 1]}
'''


def write_notebook(path: Path, parameters: str = PARAMETERS) -> None:
    cells = [dict(cell_type="code", id=f"cell-{i}", metadata={"tags": [] if i else ["parameters"]}, source=source,
                  outputs=[], execution_count=None) for i, source in enumerate((parameters, BODY, END, LATE))]
    kernel = dict(name="python3", display_name="python3", language="python")
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


def make_lab(folder: Path, spec: str = SPEC) -> Path:
    "A folder with a toy notebook and its spec; also the home of its runs."
    write_notebook(folder / "toy.ipynb")
    (folder / "toy.yaml").write_text(spec)
    (folder / "constant.txt").write_text("7")
    return folder


def command(lab: Path, *arguments: str) -> subprocess.Popen:
    "temp-nce in a process of its own."
    code = "import sys; from temp_nce.lab.cli import main; main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *arguments, "--home", str(lab)], cwd=lab, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def processes(folder: Path) -> list[psutil.Process]:
    "The worker and the kernel of a run, by the variable that marks them."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEMP_NCE_RUN") == str(folder): found.append(process)
        except psutil.Error: continue
    return found


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition(): return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def lines(path: Path) -> int: return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def lab(tmp_path) -> Path: return make_lab(tmp_path)


# --- specs and runs -------------------------------------------------------------------------------------------------

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
        words = shlex.split(run.command)
        assert words[:5] == ["temp-nce", "run", "toy", "--scale", "paper"]
        assert [again.id for again in plan(spec, "paper", _overrides(words[6::2]))] == [run.id]


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


def test_every_ledger_of_the_repository_is_whole(monkeypatch):
    monkeypatch.delenv("TEMP_NCE_HOME", raising=False)
    for path in (find_home() / "data" / "results").glob("*.jsonl"):
        text = path.read_text()
        ids = [json.loads(line)["id"] for line in text.splitlines()]
        assert len(ids) == len(set(ids)) and text.endswith("\n"), path
        assert max(map(len, text.splitlines()), default=0) < 4096, path


# --- the ledger -----------------------------------------------------------------------------------------------------

def test_a_cut_off_last_line_is_dropped_and_nothing_else(tmp_path, capsys):
    ledger = Ledger("toy", tmp_path)
    for number in range(3): ledger.put({"id": f"run{number}", "text": "τ"})
    whole = ledger.path.read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):  # everywhere in the last line, also inside a character
        ledger.path.write_bytes(whole[:-cut])
        kept = [row["id"] for row in ledger.rows()]
        assert kept == (["run0", "run1", "run2"] if cut == 1 else ["run0", "run1"])
        assert ("cut off" in capsys.readouterr().err) is (cut > 1)
    ledger.put({"id": "run2", "text": "τ"})
    assert ledger.path.read_bytes() == whole and [path.name for path in ledger.path.parent.iterdir()] == ["toy.jsonl"]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    ledger = Ledger("toy", tmp_path)
    for number in range(3): ledger.put({"id": f"run{number}"})
    ledger.path.write_text(ledger.path.read_text().replace('{"id": "run1"}', "<<<<<<< HEAD"))
    before = ledger.path.read_bytes()
    with pytest.raises(ValueError, match="line 2 is not a row of a ledger: <<<<<<< HEAD"): ledger.put({"id": "run9"})
    assert ledger.path.read_bytes() == before


def test_processes_that_record_at_the_same_time_lose_no_row(tmp_path):
    code = ("import sys; from temp_nce.lab.experiment import Ledger; ledger = Ledger('toy', sys.argv[1])\n"
            "for i in range(20): ledger.put({'id': f'{sys.argv[2]}{i % 10}', 'i': i})")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    rows = Ledger("toy", tmp_path).rows()
    assert sorted(row["id"] for row in rows) == sorted(f"{name}{i}" for name in "abc" for i in range(10))
    assert all(row["i"] >= 10 for row in rows)


def test_a_lock_is_held_once(tmp_path):
    first = _Lock(tmp_path / "lock", wait=False)
    assert first.held and not _Lock(tmp_path / "lock", wait=False).held
    first.release()
    with _Lock(tmp_path / "lock", wait=False) as again: assert again.held


def test_curves_are_thinned_and_bear_a_cut_off_history(tmp_path):
    entries = [{"epoch": e, "loss": 1 / e, "knn": e if e % 10 == 0 else None} for e in range(1, 801)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"epoch": 801, "lo')
    curves = _curves(tmp_path, ["loss", "knn", "absent"])
    assert set(curves) == {"loss", "knn"} and len(curves["loss"][0]) == 32 and len(curves["knn"][0]) == 32
    assert curves["loss"][0][0] == 1 and curves["loss"][0][-1] == 800 and curves["knn"][1][-1] == 800
    assert len(json.dumps(curves)) < 2000 and _curves(tmp_path / "nowhere", ["loss"]) == {}


# --- execution ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "The four runs of the toy grid, executed two at a time."
    lab = make_lab(tmp_path_factory.mktemp("done"))
    spec = load_spec(lab / "toy.yaml")
    out = StringIO()
    outcome = execute(plan(spec, "quick"), jobs=2, device="cpu", home=lab, out=out)
    assert outcome.ok and outcome.done == 4, out.getvalue()
    return lab, spec, out.getvalue()


def test_a_grid_leaves_folders_and_rows(done):
    lab, spec, said = done
    rows = {row["id"]: row for row in Ledger("toy", lab).rows()}
    assert list(sorted(rows)) == sorted(run.id for run in plan(spec, "quick"))
    for run in plan(spec, "quick"):
        row, folder = rows[run.id], run.folder(lab)
        files = {"notebook.ipynb", "config.json", "env.json", "history.jsonl", "metrics.json", "log.txt"}
        assert {path.name for path in folder.iterdir()} >= files
        assert row["metrics"] == json.loads((folder / "metrics.json").read_text()) and row["parameters"] == run.parameters
        assert row["metrics"]["constant"] == 7 and row["metrics"]["in_test"] == 0  # the notebook's folder; no IN_TEST
        assert row["metrics"]["threads"] == 1 == row["threads"]  # whatever the number of jobs
        assert row == ledger_row(folder) and row["attempts"] == 1
        assert row["seconds"] > 0 and row["peak_memory_mib"] > 10
        assert row["curves"]["loss"] == [[1, 2, 3, 4], [1.0, 0.5, 0.3333, 0.25]] and len(json.dumps(row)) < 4096
        assert len(json.loads((folder / "notebook.ipynb").read_text())["cells"]) == 5  # with papermill's injected one
    assert len({row["metrics"]["score"] for row in rows.values()}) == 4
    assert len(said.splitlines()) == 6 and "4 of 4 runs are done" in said and "[4/4]" in said and "left" in said
    assert "IPKernelApp" not in said and "from step" not in said and "\r" not in said and "\x1b" not in said


def test_a_second_call_skips_and_a_lost_row_is_written_again(done):
    lab, spec, _ = done
    ledger, folder = Ledger("toy", lab), plan(spec, "quick")[0].folder(lab)
    rows, stamp = {row["id"]: row for row in ledger.rows()}, (folder / "notebook.ipynb").stat().st_mtime_ns
    kept = [line for line in ledger.path.read_text().splitlines(keepends=True) if folder.name not in line]
    assert len(kept) == 3
    ledger.path.write_text("".join(kept))
    outcome = execute(plan(spec, "quick"), device="cpu", home=lab, out=(out := StringIO()))
    assert outcome.ok and outcome.skipped == 4 and "nothing left to do, all 4 runs are done" in out.getvalue()
    assert {row["id"]: row for row in ledger.rows()} == rows
    assert (folder / "notebook.ipynb").stat().st_mtime_ns == stamp


def test_a_row_from_elsewhere_counts_only_when_asked_and_is_compared(done, tmp_path):
    lab, spec, _ = done
    elsewhere = make_lab(tmp_path)
    runs = plan(load_spec(elsewhere / "toy.yaml"), "quick")[:1]
    row = next(row for row in Ledger("toy", lab).rows() if row["id"] == runs[0].id)
    Ledger("toy", elsewhere).put(row | {"commit": "another"})
    outcome = execute(runs, device="cpu", home=elsewhere, missing=True, out=StringIO())
    assert outcome.ok and outcome.skipped == 1 and not runs[0].folder(elsewhere).exists()
    outcome = execute(runs, device="cpu", home=elsewhere, out=(out := StringIO()))
    assert outcome.done == 1 and "all 1 have the same metrics to the last digit" in out.getvalue()
    assert [row["commit"] for row in Ledger("toy", elsewhere).rows()] == [_git("rev-parse", "HEAD", folder=elsewhere)]


def test_find_row_wants_one_row(done):
    lab, spec, _ = done
    run = plan(spec, "quick")[0]
    assert find_row(run.id[:6], lab)["id"] == run.id
    for wrong in ("", run.id[:3], "zzzz"):
        with pytest.raises(ValueError, match="id: "): find_row(wrong, lab)


def test_devices_and_jobs_are_checked(done):
    lab, spec, _ = done
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got tpu"): _resolve_device("tpu")
    assert _resolve_device("cpu") == "cpu" and _resolve_device("auto") in ("cpu", "cuda")
    with pytest.raises(ValueError, match="jobs: expected a whole number above 0, got 0"):
        execute(plan(spec, "quick"), jobs=0, home=lab)
    with pytest.raises(ValueError, match="runs: expected at least one"): execute([], home=lab)
    assert [_duration(seconds) for seconds in (3.2, 99, 240, 7500)] == ["3 s", "99 s", "4 min", "2 h 5 min"]


def test_one_failure_stops_nothing_and_is_told_in_one_line(lab):
    sets = [word for name in ("broken", "late", "free") for word in ("--set", f"temperature={name}")]
    process = command(lab, "run", "toy.yaml", *sets, "--set", "seed=0", "--jobs", "3", "--device", "cpu")
    out, err = process.communicate(timeout=120)
    broken, late, free = plan(load_spec(lab / "toy.yaml"), "quick", {"temperature": ["broken", "late", "free"], "seed": [0]})
    assert process.returncode == 1
    assert sorted(err.splitlines()) == [
        "failed: toy temperature=broken seed=0: ValueError: temperature: broken is not known; "
        f"open {broken.folder(lab) / 'notebook.ipynb'}",
        f"failed: toy temperature=late seed=0: RuntimeError: after the metrics; open {late.folder(lab) / 'notebook.ipynb'}"]
    assert "1 of 3 runs are done" in out and not (broken.folder(lab) / "metrics.json").exists()
    assert not (late.folder(lab) / "metrics.json").exists()  # though it had handed over its metrics before it failed
    assert [row["id"] for row in Ledger("toy", lab).rows()] == [free.id]
    assert "broken is not known" in (broken.folder(lab) / "notebook.ipynb").read_text()  # the notebook to open shows it


def test_kill_9_of_child_and_of_parent_and_ctrl_c_lose_nothing(lab):
    (lab / "toy.yaml").write_text(SPEC.replace("steps: 4", "steps: 40, fast: false"))
    (run,) = plan(load_spec(lab / "toy.yaml"), "smoke")
    folder, steps = run.folder(lab), run.folder(lab) / "steps.txt"
    start = lambda: command(lab, "run", "toy.yaml", "--scale", "smoke", "--device", "cpu")

    process = start()
    wait_for(lambda: lines(steps) >= 3)
    worker = min(processes(folder), key=lambda each: each.create_time())
    worker.kill()  # SIGKILL to the child
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "killed by signal 9 (SIGKILL)" in err and len(err.splitlines()) == 1
    assert not processes(folder) and not (folder / "metrics.json").exists()  # the kernel went with it
    first = lines(steps)

    process = start()
    wait_for(lambda: lines(steps) >= first + 3)
    process.kill()  # SIGKILL to the parent
    process.communicate(timeout=30)
    wait_for(lambda: not processes(folder), 15)
    second = lines(steps)
    assert not (folder / "metrics.json").exists()

    process = start()
    wait_for(lambda: lines(steps) >= second + 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not err and not processes(folder)
    assert "stopped: 0 of 1 runs are done, 1 cut off; the same command goes on from there" in out

    process = start()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err
    made = [int(line) for line in steps.read_text().split()]
    assert sorted(set(made)) == list(range(1, 41)) and len(made) <= 43  # at most the step of each cut was made twice
    state = "free 0"
    for _ in range(40): state = hashlib.sha256(state.encode()).hexdigest()
    (row,) = Ledger("toy", lab).rows()
    assert row["metrics"]["score"] == int(state[:8], 16) / 2**32 and row["attempts"] == 4
    assert row["seconds"] > 40 * 0.2  # the time of all attempts
    assert (folder / "log.txt").read_text().count("temp-nce run toy --scale smoke") == 4


def test_two_commands_at_the_same_time_share_the_work(lab):
    (lab / "toy.yaml").write_text(SPEC.replace("steps: 4", "steps: 8, fast: false"))
    both = [command(lab, "run", "toy.yaml", "--set", "seed=0", "--jobs", "1", "--device", "cpu") for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    for run in plan(load_spec(lab / "toy.yaml"), "quick", {"seed": [0]}):  # each was executed once
        assert (run.folder(lab) / "steps.txt").read_text().split() == [str(i) for i in range(1, 9)]
    assert len(Ledger("toy", lab).rows()) == 2


# --- grids with further settings, specs like others, runs that two specs share ---------------------------------------

def test_include_adds_settings_with_other_values_of_some_axes(lab):
    text = SPEC.replace("paper: {parameters: {steps: 9}}", "paper: {parameters: {steps: 9}, include: [{temperature: [1, 0.5], seed: [5]}]}")
    (lab / "toy.yaml").write_text(text)
    spec = load_spec(lab / "toy.yaml")
    labels = [run.label for run in plan(spec, "paper")]
    assert labels[-2:] == ["temperature=1 seed=5", "temperature=0.5 seed=5"] and len(labels) == 6 and len(plan(spec, "quick")) == 4
    assert [run.overrides for run in plan(spec, "paper", {"temperature": ["1"], "seed": ["5"]})] == [{}]  # a point of the grids
    assert plan(spec, "paper", {"temperature": ["1"], "seed": ["0"]})[0].overrides  # not one
    assert [run.label for run in plan(spec, "paper", {"temperature": ["1"]})] == ["temperature=1 seed=5"]  # with its own seeds
    assert len(plan(spec, "paper", {"temperature": ["0.5"]})) == 3 and len(plan(spec, "paper", {"lr": ["7"]})) == 6


def test_a_spec_that_extends_another_takes_what_it_does_not_say(lab):
    (lab / "kin.yaml").write_text("title: Kin\nextends: toy\nfixed: {lr: 0.5}\nscales: {quick: {grid: {seed: [7]}}}\n")
    kin = load_spec(lab / "kin.yaml")
    assert kin.title == "Kin" and kin.fixed == {"steps": 4, "lr": 0.5} and kin.curves == ["loss"] and not kin.paper
    assert [run.label for run in plan(kin, "quick")] == ["temperature=0.5 seed=7", "temperature=free seed=7"]
    assert plan(kin, "paper")[0].parameters["steps"] == 9 and kin.scales["quick"]["about"] == "four runs"


@pytest.mark.parametrize("text, message", [
    ("title: Kin\nextends: tou\n", "extends: there is no other spec tou.yaml"), ("title: Kin\nextends: kin\n", "extends: there is no other spec kin.yaml"),
    ("title: Kin\nextends: toy\nscales: {quick: {include: {seed: [1]}}}\n", "include: expected a list of grids"),
    ("title: Kin\nextends: toy\nscales: {quick: {include: [{sed: [1]}]}}\n", "unknown key sed; did you mean seed?"),
    ("title: Kin\nextends: toy\npaired: [{question: Why, metric: scor, against: constant}]\n", "scor is not a metric; did you mean score?"),
    ("title: Kin\nextends: toy\npaired: [{question: Why, metric: score}]\n", "the key against is missing")])
def test_wrong_relations_between_specs_are_refused(lab, text, message):
    (lab / "kin.yaml").write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")): load_spec(lab / "kin.yaml")


def test_a_run_made_for_one_spec_is_taken_over_by_another(done, tmp_path):
    lab, spec, _ = done
    (lab / "kin.yaml").write_text("title: Kin\nextends: toy\nscales: {quick: {grid: {seed: [0]}}}\n")
    kin, out = load_spec(lab / "kin.yaml"), StringIO()
    outcome = execute(plan(kin, "quick"), jobs=1, device="cpu", home=lab, out=out)
    assert outcome.ok and outcome.done == 2 and out.getvalue().count("the same run as one of toy, taken over") == 2
    original = {row["id"]: row for row in Ledger("toy", lab).rows()}
    for row in Ledger("kin", lab).rows():
        assert row["spec"] == "kin" and row["command"].startswith("temp-nce run kin ")
        assert all(row[name] == original[row["id"]][name] for name in ("metrics", "parameters", "seconds", "commit", "notebook_sha256"))
    assert execute(plan(kin, "quick"), jobs=1, device="cpu", home=lab, out=out).skipped == 2


def test_a_repetition_is_made_and_not_taken_over(done):
    lab, spec, _ = done
    row, out = Ledger("toy", lab).rows()[0], StringIO()
    outcome, changed = repeat(row["id"], spec=spec, device="cpu", home=lab, out=out)
    assert outcome.ok and not changed and "taken over" not in out.getvalue()
    folder = next((lab / "data/runs/toy").glob(f"{row['id']}-repeat*"))
    assert lines(folder / "steps.txt") == 4 and json.loads((folder / "env.json").read_text())["finished"] >= row["finished"]
    assert (folder / "notebook.ipynb").read_bytes() != (folder.parent / row["id"] / "notebook.ipynb").read_bytes()


def test_a_shared_notebook_tells_nothing_of_the_machine(done):
    lab, spec, _ = done
    row = Ledger("toy", lab).rows()[0]
    original = lab / "data/runs/toy" / row["id"] / "notebook.ipynb"
    assert str(lab) in original.read_text()
    path = share(row["id"], spec=spec, home=lab)
    assert path.parent == lab / "data/results" and path.name.startswith("toy-") and path.suffix == ".ipynb"
    shared, executed = (nbformat.read(file, 4) for file in (path, original))
    nbformat.validate(shared)
    assert str(lab) not in path.read_text() and set(shared.metadata) == {"kernelspec"}
    assert [cell.get("outputs") for cell in shared.cells] == [cell.get("outputs") for cell in executed.cells]
    injected = next(cell.source for cell in shared.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "seed = " in injected and not any(f"{name} =" in injected for name in RUNTIME)
    with pytest.raises(ValueError, match="bytes, more than 1000"): share(row["id"], spec=spec, home=lab, limit=1000)


def test_a_notebook_that_lies_elsewhere_cannot_be_shared(done, tmp_path):
    lab, spec, _ = done
    Ledger("toy", tmp_path).put(row := Ledger("toy", lab).rows()[0])
    with pytest.raises(ValueError, match=f"{row['id']} is not on this machine; temp-nce run toy .* --force makes it again"):
        share(row["id"], spec=spec, home=tmp_path)
    assert not list(tmp_path.rglob("*.ipynb"))
