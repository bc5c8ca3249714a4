"""Batches of toy runs: what they leave, what is skipped, failures, and what survives kill -9."""
import hashlib
import json
import os
import signal
import subprocess
from io import StringIO
from pathlib import Path

import nbformat
import psutil
import pytest

from lab_toys import SPEC, command, is_free, lines, make_lab, processes, wait_for
from temp_nce.lab.batch import _duration, _take_over, execute, repeat
from temp_nce.lab.ledger import Ledger, find_row, ledger_row, lock
from temp_nce.lab.run import RUNTIME, plan
from temp_nce.lab.share import share
from temp_nce.lab.spec import load_spec
from temp_nce.lab.worker import end_worker, find_places, make_task, start_worker


@pytest.fixture
def lab(tmp_path) -> Path: return make_lab(tmp_path)


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
        assert (row["metrics"] == json.loads((folder / "metrics.json").read_text()) and row["parameters"]
                == run.parameters)
        assert row["metrics"]["constant"] == 7 and row["metrics"]["in_test"] == 0  # the notebook's folder; no IN_TEST
        assert row["metrics"]["threads"] == 1 == row["threads"]  # whatever the number of jobs
        assert row == ledger_row(folder) and row["attempts"] == 1
        assert row["seconds"] > 0 and row["peak_memory_mib"] > 10
        assert row["curves"]["loss"] == [[1, 2, 3, 4], [1.0, 0.5, 0.3333, 0.25]] and len(json.dumps(row)) < 4096
        assert len(json.loads((folder / "notebook.ipynb").read_text())["cells"]) == 5  # with papermill's injected one
    assert len({row["metrics"]["score"] for row in rows.values()}) == 4
    assert (len(said.splitlines()) == 7 and "started: toy temperature=0.5 seed=0" in said
            and "4 of 4 runs are done" in said and "[4/4]" in said and "left" in said)
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
    assert "equal to the recorded row" in out.getvalue()
    assert [row["commit"] for row in Ledger("toy", elsewhere).rows()] == ["another"]  # an equal row stays as it is


def test_find_row_wants_one_row(done):
    lab, spec, _ = done
    run = plan(spec, "quick")[0]
    assert find_row(run.id[:6], lab)["id"] == run.id
    for wrong in ("", run.id[:3], "zzzz"):
        with pytest.raises(ValueError, match="id: "): find_row(wrong, lab)


def test_devices_and_jobs_are_checked(done):
    lab, spec, _ = done
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda or cuda:N, got tpu"): find_places("tpu")
    assert find_places("cpu")[0] is None and find_places("auto", jobs=1)[0] in (None, "0")
    with pytest.raises(ValueError, match="jobs: expected a whole number above 0, got 0"):
        execute(plan(spec, "quick"), jobs=0, home=lab)
    with pytest.raises(ValueError, match="runs: expected at least one"): execute([], home=lab)
    assert [_duration(seconds) for seconds in (3.2, 99, 240, 7500)] == ["3 s", "99 s", "4 min", "2 h 5 min"]


def test_one_failure_stops_nothing_and_is_told_in_one_line(lab):
    sets = [word for name in ("broken", "late", "free") for word in ("--set", f"temperature={name}")]
    process = command(lab, "run", "toy.yaml", *sets, "--set", "seed=0", "--jobs", "3", "--device", "cpu")
    out, err = process.communicate(timeout=120)
    broken, late, free = plan(load_spec(lab / "toy.yaml"), "quick",
                              {"temperature": ["broken", "late", "free"], "seed": [0]})
    assert process.returncode == 1
    assert sorted(err.splitlines()) == [
        "failed: toy temperature=broken seed=0: ValueError: temperature: broken is not known; "
        f"open {broken.folder(lab) / 'notebook.ipynb'}",
        f"failed: toy temperature=late seed=0: RuntimeError: after the metrics; open "
        f"{late.folder(lab) / 'notebook.ipynb'}"]
    assert "1 of 3 runs are done" in out and not (broken.folder(lab) / "metrics.json").exists()
    assert not (late.folder(lab) / "metrics.json").exists()  # though it had handed over its metrics before it failed
    assert [row["id"] for row in Ledger("toy", lab).rows()] == [free.id]
    assert "broken is not known" in (broken.folder(lab) / "notebook.ipynb").read_text()  # the notebook to open shows it


@pytest.mark.slow
def test_kill_9_of_child_and_of_parent_and_ctrl_c_lose_nothing(lab):
    (lab / "toy.yaml").write_text(SPEC.replace("steps: 4", "steps: 40, fast: false"))
    (run,) = plan(load_spec(lab / "toy.yaml"), "smoke")
    folder, steps = run.folder(lab), run.folder(lab) / "steps.txt"
    start = lambda: command(lab, "run", "toy.yaml", "--scale", "smoke", "--device", "cpu")

    process = start()
    wait_for(lambda: lines(steps) >= 3)
    worker = processes(folder)[0]
    assert "lab.worker" in " ".join(worker.cmdline())
    worker.kill()  # SIGKILL to the child
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "killed by signal 9 (SIGKILL)" in err and len(err.splitlines()) == 1
    assert not processes(folder) and not (folder / "metrics.json").exists()  # the kernel went with it
    first = lines(steps)

    process = start()
    wait_for(lambda: lines(steps) >= first + 3)
    process.kill()  # SIGKILL to the parent
    process.communicate(timeout=30)
    wait_for(lambda: is_free(folder), 15)
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
    assert (folder / "log.txt").read_text().count("temp-nce run toy.yaml --scale smoke") == 4


@pytest.mark.slow
def test_two_commands_at_the_same_time_share_the_work(lab):
    (lab / "toy.yaml").write_text(SPEC.replace("steps: 4", "steps: 8, fast: false"))
    both = [command(lab, "run", "toy.yaml", "--set", "seed=0", "--jobs", "1", "--device", "cpu") for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    for run in plan(load_spec(lab / "toy.yaml"), "quick", {"seed": [0]}):  # each was executed once
        assert (run.folder(lab) / "steps.txt").read_text().split() == [str(i) for i in range(1, 9)]
    assert len(Ledger("toy", lab).rows()) == 2


def test_a_run_made_for_one_spec_is_taken_over_by_another(done, tmp_path):
    lab, spec, _ = done
    (lab / "kin.yaml").write_text("title: Kin\nextends: toy\nscales: {quick: {grid: {seed: [0]}}}\n")
    kin, out = load_spec(lab / "kin.yaml"), StringIO()
    outcome = execute(plan(kin, "quick"), jobs=1, device="cpu", home=lab, out=out)
    assert outcome.ok and outcome.done == 2 and out.getvalue().count("the same run as one of toy, taken over") == 2
    original = {row["id"]: row for row in Ledger("toy", lab).rows()}
    for row in Ledger("kin", lab).rows():
        assert row["spec"] == "kin" and row["command"].startswith("temp-nce run kin.yaml ")
        assert all(row[name] == original[row["id"]][name] for name in ("metrics", "parameters", "seconds", "commit",
                                                                       "notebook_sha256"))
    assert execute(plan(kin, "quick"), jobs=1, device="cpu", home=lab, out=out).skipped == 2


def test_a_run_of_another_notebook_with_the_same_name_is_not_taken_over(done, tmp_path):
    home, spec, _ = done
    (tmp_path / "other").mkdir()
    other = make_lab(tmp_path / "other")
    (other / "toy.yaml").rename(other / "second.yaml")
    run = plan(load_spec(other / "second.yaml"), "smoke")[0]
    assert run.id in {each.id for each in plan(spec, "quick")} and run.spec.notebook.name == spec.notebook.name
    assert _take_over(run, run.folder(home)) is None and not run.folder(home).exists()


def test_a_worker_that_waits_does_not_end_the_kernel_of_the_one_that_holds_the_run(lab):
    run = plan(load_spec(lab / "toy.yaml"), "smoke")[0]
    task = make_task(run, lab, remote=True)  # waits for the lock
    folder = Path(task["folder"])
    with lock(folder / "lock"):
        kernel = subprocess.Popen(["sleep", "60"], env=os.environ | {"TEMP_NCE_RUN": str(folder)})
        waiting = start_worker(task)
        wait_for(lambda: waiting.poll() is not None or "temp-nce" in str(psutil.Process(waiting.pid).open_files())
                 or any(Path("/tmp").glob(f"temp-nce-kernel-*-{waiting.pid}-*")))
        end_worker(waiting)
        assert kernel.poll() is None
        kernel.kill()
        kernel.wait()


def test_a_run_that_lost_a_file_and_its_row_does_not_stop_the_others(lab):
    runs = plan(load_spec(lab / "toy.yaml"), "quick")
    assert execute(runs[:1], device="cpu", home=lab, out=StringIO()).ok
    Ledger("toy", lab).path.unlink()
    (runs[0].folder(lab) / "notebook.ipynb").unlink()
    outcome = execute(runs[:2], device="cpu", home=lab, out=StringIO())
    assert outcome.done == 1 and "notebook.ipynb has vanished; --force" in outcome.failed[0][1]


def test_a_worker_that_cannot_be_started_fails_its_run_alone(lab, monkeypatch):
    def refuse(*_): raise BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr("temp_nce.lab.worker.start_worker", refuse)
    outcome = execute(plan(load_spec(lab / "toy.yaml"), "smoke"), device="cpu", home=lab, out=StringIO())
    assert not outcome.ok and "Resource temporarily unavailable" in outcome.failed[0][1]


def test_a_repetition_is_made_and_not_taken_over(done):
    lab, spec, _ = done
    row, out = Ledger("toy", lab).rows()[0], StringIO()
    outcome, changed = repeat(row["id"], spec=spec, device="cpu", home=lab, out=out)
    assert outcome.ok and not changed and "taken over" not in out.getvalue()
    folder = next((lab / "data/runs/toy").glob(f"{row['id']}-repeat*"))
    assert (lines(folder / "steps.txt") == 4 and json.loads((folder / "env.json").read_text())["finished"]
            >= row["finished"])
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
    with pytest.raises(ValueError, match=f"{row['id']} is not on this machine; temp-nce run toy.yaml .* --force makes "
                       f"it again"):
        share(row["id"], spec=spec, home=tmp_path)
    assert not list(tmp_path.rglob("*.ipynb"))
