"""What a shared ledger, a foreign spec, a full disk or a signal can do: one line each, nothing written elsewhere."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest

from lab_toys import PARAMETERS, SPEC, command, is_free, lines, make_lab, make_row, wait_for, write_notebook
from temp_nce.lab.batch import _Progress, execute, repeat
from temp_nce.lab.ledger import Ledger, find_row, spec_of
from temp_nce.lab.run import plan
from temp_nce.lab.share import share
from temp_nce.lab.spec import load_spec
from temp_nce.lab.worker import _count_time, find_places, why_failed

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))


@pytest.fixture
def lab(tmp_path) -> Path: return make_lab(tmp_path)


def shell(lab: Path, *arguments: str) -> tuple[int, str, str]:
    process = command(lab, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


MALFORMED = [  # spec -> what the one line says
    (SPEC.replace("A toy", "[A, toy]"), "title: expected a text, got ['A', 'toy']"),
    (SPEC.replace("A toy", "7"), "title: expected a text, got 7"),
    (SPEC.replace("toy.ipynb", "[]"), "notebook"),
    (SPEC.replace("toy.ipynb", "3"), "notebook: expected the file name of a notebook"),
    (SPEC + "threads: true\n", "threads: expected a whole number, got True"),
    (SPEC + "threads: 2.5\n", "threads: expected a whole number, got 2.5"),
    (SPEC + "replicate: nope\n", "replicate: nope is not an axis of the grid"),
    (SPEC + "replicate: [seed]\n", "replicate: expected a text"),
    (SPEC + "notes: [{a: b}]\n", "notes: 0: expected a text"),
    (SPEC + "notes: text\n", "notes: expected a list, got 'text'"),
    (SPEC + "about: [1]\n", "about: expected a text, got [1]"),
    (SPEC + "main: [score]\n", "main: expected a text"),
    (SPEC + "margin: 0\n", "margin"),
    (SPEC + "margin: {scor: 2.0}\n", "margin: scor is not a metric; did you mean score?"),
    (SPEC + "baselines: [[1]]\n", "baselines: 0: expected a number, a text"),
    (SPEC + "source: {url: 'javascript:alert(1)'}\n", "source: url: expected an address"),
    (SPEC + "source: {url: 'https://a b'}\n", "source: url: expected an address"),
    (SPEC + "source: [paper]\n", "source: expected names with values"),
    (SPEC + "name: other\n", "unknown key name"),
    (SPEC.replace("[50, 1]", "[.nan, 1]"), "expected a number, a text, true or false, got nan"),
    (SPEC.replace("[50, 1]", ".inf"), "expected a number, a text, true or false, got inf"),
    (SPEC.replace("[50, 1]", "[true, 1]"), "score: expected a mean or [mean, std]"),
    (SPEC.replace("[50, 1]", "[50, -1]"), "score: expected a mean or [mean, std]"),
    (SPEC.replace("[0, 1]", "[0, [1]]"), "seed: expected a number, a text, true or false, got [1]"),
    (SPEC.replace("[0, 1]", "[]"), "seed: expected a list of values, got []"),
    (SPEC.replace("[0, 1]", "[2024-01-01]"), "seed: expected a number, a text"),
    (SPEC.replace("percent: true", "percent: 1"), "percent: expected true or false, got 1"),
    (SPEC.replace("percent: true", "better: most"), "better: expected 'high' or 'low', got 'most'"),
    (SPEC.replace("percent: true", "digits: -1"), "digits: expected greater than or equal to 0, got -1"),
    ("[]", "expected names with values, got []"), ("", "the key title is missing"),
    ("3", "expected names with values, got 3"),
    ("title: A\nextends: ../x\n", "extends: expected the name of a spec beside this one, got '../x'"),
    ("title: A\nextends: [toy]\n", "extends: expected the name of a spec beside this one"),
    ("[" * 3000 + "]" * 3000, "nested more than 31 deep"), (BOMB, "stands for more than 100000 values"),
    ("a: &a [*a]\n", "stands for nothing, or for itself"), ("a: " + "9" * 5000, "toy.yaml: "),
    ("\x00", "not valid YAML"),
]


@pytest.mark.parametrize("text, message", MALFORMED)
def test_a_malformed_spec_is_one_line_that_names_the_file(lab, text, message):
    (lab / "toy.yaml").write_text(text)
    with pytest.raises(ValueError) as error: load_spec(lab / "toy.yaml")
    assert message in str(error.value) and str(error.value).startswith("toy.yaml: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_spec_that_is_not_utf8_is_named(lab):
    (lab / "toy.yaml").write_bytes(SPEC.replace("A toy", "é").encode("latin-1"))
    with pytest.raises(ValueError, match="toy.yaml: .*not UTF-8"): load_spec(lab / "toy.yaml")


NO_NOTEBOOKS = ["[]", "3", "{}", '{"cells": 3}', '{"cells": [3]}',
                '{"cells": [{"metadata": [], "source": ""}]}', "{", "[" * 5000]


@pytest.mark.parametrize("text", NO_NOTEBOOKS)
def test_a_notebook_that_is_none_is_one_line(lab, text):
    (lab / "toy.ipynb").write_text(text)
    code, out, err = shell(lab, "run", "toy.yaml")
    assert code == 2 and not out and len(err.splitlines()) == 1 and "toy.ipynb" in err and "Traceback" not in err


FORGED = [{"id": "../../../../etc"}, {"id": "../../../x"}, {"id": 3}, {"id": None}, {"id": "0" * 13},
          {"id": "0123456789AB"},
          {"id": "0123456789ab\n"}, {"spec": "../x"}, {"spec": 3}, {"scale": "huge"}, {"scale": None},
          {"parameters": []},
          {"parameters": None}, {"metrics": []}, {"metrics": {"score": "high"}}, {"metrics": {"score": [1]}},
          {"metrics": {"score": True}}, {"metrics": {"score": float("nan")}}, {"metrics": {"score": float("inf")}},
          {"threads": "many"}, {"threads": 1.5}, {"seconds": "long"}, {"versions": ["torch"]}, {"curves": {"loss": 3}},
          {"curves": {"loss": [[1]]}}, {"set": []}, {"command": 3}, {"hardware": 3}, {"finished": 3}, {"spec_file": 3}]


@pytest.mark.parametrize("forged", FORGED, ids=str)
def test_a_forged_row_is_refused_and_nothing_is_written(lab, forged):
    ledger = Ledger("toy", lab)
    ledger.put(make_row(7))
    line = json.dumps(make_row(1) | forged)
    ledger.path.write_text(line + "\n" + ledger.path.read_text())
    before = {path: path.read_bytes() for path in lab.rglob("*") if path.is_file()}
    for ask in (ledger.rows, lambda: find_row("0000", lab), lambda: repeat("000000000007", home=lab, out=StringIO())):
        with pytest.raises(ValueError, match="toy.jsonl: line 1 is not a row of a ledger: ") as error: ask()
        assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in lab.rglob("*") if path.is_file()} == before


NO_ROWS = ["<<<<<<<", "[]", "3", '"text"', "null", "{", '{"id": "000000000001"}', "[" * 9000,
           "\x00", "9" * 5000]


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_is_one_line(lab, line):
    ledger = Ledger("toy", lab)
    ledger.put(make_row(7))
    ledger.path.write_text(line + "\n" + ledger.path.read_text())
    with pytest.raises(ValueError, match="toy.jsonl: line 1 is not a row of a ledger: "): ledger.rows()


def test_a_ledger_that_is_not_utf8_is_named(lab):
    ledger = Ledger("toy", lab)
    for number in range(2): ledger.put(make_row(number, command="é"))
    ledger.path.write_bytes(ledger.path.read_bytes().replace("é".encode(), b"\xe9", 1))
    with pytest.raises(ValueError, match="toy.jsonl: line 1 is not a row"): ledger.rows()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_separators_of_unicode_do_not_end_a_row(lab, separator):
    ledger = Ledger("toy", lab)
    row = make_row(1, parameters={"temperature": f"a{separator}b"})
    ledger.put(row)
    ledger.put(make_row(2))
    assert ledger.rows() == [row, make_row(2)]


def test_a_spec_file_is_followed_only_inside_the_home(lab, tmp_path_factory):
    outside = make_lab(tmp_path_factory.mktemp("outside"))
    (lab / "data").mkdir()
    make_lab(lab / "data")
    for way in (os.path.relpath(outside / "toy.yaml", lab), str(outside / "toy.yaml"), "data/toy.yaml", "other.yaml"):
        with pytest.raises(ValueError, match="is no file that a row may name"): spec_of(make_row(1, spec_file=way), lab)
    assert spec_of(make_row(1, spec_file="toy.yaml"), lab).path == lab / "toy.yaml"


@pytest.mark.slow
def test_a_run_of_a_spec_file_is_repeated_and_shared_by_its_row(lab):
    (lab / "sub").mkdir()
    inner = make_lab(lab / "sub")
    name = "x$(touch y).yaml"
    (inner / "toy.yaml").rename(inner / name)
    code, out, err = shell(lab, "run", f"sub/{name}", "--scale", "smoke", "--device", "cpu")
    assert (code, err) == (0, "")
    (row,) = Ledger("x$(touch y)", lab).rows()
    assert row["spec_file"] == f"sub/{name}" and shlex.split(row["command"])[2] == f"sub/{name}"
    assert subprocess.run(["sh", "-c", f"set -- {row['command']}; echo $#"], capture_output=True, text=True,
                          cwd=lab).stdout == "9\n"
    assert not list(lab.rglob("y"))
    code, out, err = shell(lab, "run", "--id", row["id"], "--device", "cpu")
    assert (code, err) == (0, "") and "the metrics equal the recorded ones to the last digit" in out
    assert share(row["id"], home=lab).exists()


def test_values_are_checked_before_the_first_kernel(lab):
    write_notebook(lab / "toy.ipynb")
    notebook = json.loads((lab / "toy.ipynb").read_text())
    cell = dict(cell_type="code", id="lab", metadata={"tags": ["lab"]}, outputs=[], execution_count=None)
    notebook["cells"].insert(1, cell | {"source": 'CHECKS = {"temperature": "temp_nce.losses:make_loss"}'})
    (lab / "toy.ipynb").write_text(json.dumps(notebook))
    code, out, err = shell(lab, "run", "toy.yaml", "--set", "temperature=fre", "--device", "cpu")
    assert code == 2 and not out and len(err.splitlines()) == 1 and "temperature: " in err and "fre" in err
    assert not (lab / "data" / "runs").exists() or not list((lab / "data" / "runs").rglob("config.json"))


SIGNALS = ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP", "SIGQUIT"))]


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_say_what_ctrl_c_says(lab, name):
    (lab / "toy.yaml").write_text(SPEC.replace("steps: 4", "steps: 400, fast: false"))
    (run,) = plan(load_spec(lab / "toy.yaml"), "smoke")
    process = command(lab, "run", "toy.yaml", "--scale", "smoke", "--device", "cpu")
    wait_for(lambda: lines(run.folder(lab) / "steps.txt") >= 1)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not err, err
    assert ("stopped: 0 of 1 runs are done, 1 cut off; the same command goes on from there" in out
            and is_free(run.folder(lab)))


def test_ctrl_c_at_the_start_is_no_traceback():
    code = ("from temp_nce.lab import main; import sys; sys.argv = ['temp-nce', 'list']; print('ready', flush=True); "
            "main()")
    for delay in (0.01, 0.05, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130) and err in ("", "temp-nce: stopped\n"), err


def test_left_overs_of_killed_processes_are_removed(lab):
    (run,) = plan(load_spec(lab / "toy.yaml"), "smoke")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    from temp_nce.files import process_mark
    folder, sockets = run.folder(lab), Path("/tmp") / f"temp-nce-kernel-{process_mark(dead.pid)}-abc"
    folder.mkdir(parents=True)
    (folder / f".checkpoint.pt.{process_mark(dead.pid)}-1.tmp").touch()
    kept = folder / f".checkpoint.pt.{process_mark(os.getpid())}-1.tmp"
    kept.touch()
    sockets.mkdir()
    assert execute([run], device="cpu", home=lab, out=StringIO()).ok
    assert [path.name for path in folder.glob(".*.tmp")] == [kept.name] and not sockets.exists()


def test_the_clock_of_a_run_leaves_no_half_written_file(tmp_path, monkeypatch):
    def slow_write(path: Path, value: list):
        part = path.with_suffix(".tmp")
        part.write_text(str(value))
        time.sleep(0.3)
        part.rename(path)
    monkeypatch.setattr("temp_nce.lab.worker.write_json", slow_write)
    with _count_time(tmp_path, [], time.monotonic()): wait_for(lambda: list(tmp_path.glob("*.tmp")))
    assert [path.name for path in tmp_path.iterdir()] == ["clock.json"]
    with pytest.raises(KeyError), _count_time(tmp_path, [], time.monotonic()):
        wait_for(lambda: list(tmp_path.glob("*.tmp")))
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["clock.json"]


def test_a_vanished_folder_and_a_full_disk_are_said(tmp_path, monkeypatch):
    assert "has vanished" in why_failed(tmp_path / "gone", 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0})())
    assert "no space left" in why_failed(tmp_path, 1) and str(tmp_path) in why_failed(tmp_path, 1)


def fill_disk(lab: Path, home: Path) -> bool:  # False: no small disk can be made here
    "A run of `lab` whose home lies on a disk of 300 kB: one line that says which disk, and what to do."
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(home)], capture_output=True).returncode:
        return False
    try:
        code, _, err = shell(lab, "run", "toy.yaml", "--scale", "smoke", "--device", "cpu", "--set", "steps=200000",
                             "--home", str(home))
        assert code == 1 and "o space left" in err and str(home) in err and "make room" in err, (code, err)
        assert "Traceback" not in err and len(err.splitlines()) == 1, err
    finally: subprocess.run(["umount", str(home)])
    return True


@pytest.mark.slow
def test_a_full_disk_is_one_line(lab, tmp_path_factory):
    if not fill_disk(lab, tmp_path_factory.mktemp("small")): pytest.skip("no small disk can be made here")


def test_a_log_gets_a_line_every_half_minute(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("temp_nce.lab.batch.time.monotonic", lambda: clock[0])
    progress = _Progress(out := StringIO())
    for clock[0] in range(0, 100): progress.status(1, 4, "2 running")
    assert out.getvalue().splitlines() == ["1/4 done · 2 running"] * 3


def test_places_on_several_gpus(monkeypatch):
    monkeypatch.setattr("temp_nce.lab.worker._gpu_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_places() == ["0", "1"] and find_places(per_gpu=2) == ["0", "1"] * 2 and find_places("cuda:1") == ["1"]
    assert find_places(jobs=3) == ["0", "1", "0"] and find_places("cpu", jobs=2) == [None, None]
    with pytest.raises(ValueError, match="cuda:2 asked for, but 2 GPUs are found, cuda:0 to cuda:1"):
        find_places("cuda:2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert find_places() == ["3", "7"] and find_places("cuda:1") == ["7"]


def test_each_run_gets_its_own_gpu(lab, monkeypatch):
    monkeypatch.setattr("temp_nce.lab.worker._gpu_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    notebook = (lab / "toy.ipynb").read_text()
    (lab / "toy.ipynb").write_text(notebook.replace('\\"in_test\\"', '\\"gpu\\": '
                                                    'int(os.environ[\\"CUDA_VISIBLE_DEVICES\\"]), \\"in_test\\"'))
    runs = plan(load_spec(lab / "toy.yaml"), "quick", {"seed": [0]})
    assert execute(runs, home=lab, out=(out := StringIO())).ok and "on cuda, 2 at a time" in out.getvalue()
    rows = Ledger("toy", lab).rows()
    assert sorted(row["metrics"]["gpu"] for row in rows) == [0, 1] and {row["device"] for row in rows} == {"cuda"}


def test_equal_metrics_leave_the_ledger_as_it_is(lab):
    runs = plan(load_spec(lab / "toy.yaml"), "smoke")
    assert execute(runs, device="cpu", home=lab, out=StringIO()).ok
    path = Ledger("toy", lab).path
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert execute(runs, device="cpu", home=lab, force=True, out=(out := StringIO())).done == 1
    assert (path.read_bytes() == before and path.stat().st_mtime_ns == stamp
            and "equal to the recorded row" in out.getvalue())


def test_a_parameter_that_comes_later_keeps_the_names_of_runs(lab):
    ids = [run.id for run in plan(load_spec(lab / "toy.yaml"), "quick")]
    notebook = json.loads((lab / "toy.ipynb").read_text())
    notebook["cells"][0]["source"] = PARAMETERS + "warmup = 0\n"
    cell = dict(cell_type="code", id="lab", metadata={"tags": ["lab"]}, outputs=[], execution_count=None)
    notebook["cells"].insert(1, cell | {"source": 'NEUTRAL = {"warmup": 0}'})
    (lab / "toy.ipynb").write_text(json.dumps(notebook))
    spec = load_spec(lab / "toy.yaml")
    assert [run.id for run in plan(spec, "quick")] == ids == [run.id for run in plan(spec, "quick", {"warmup": [0]})]
    assert not set(ids) & {run.id for run in plan(spec, "quick", {"warmup": [3]})}


@pytest.mark.parametrize("gone", ["config.json", "env.json", "metrics.json"])
def test_a_run_that_vanishes_before_it_is_recorded_is_one_line(lab, monkeypatch, capsys, gone):
    import temp_nce.lab.batch as batch
    whole = batch.ledger_row

    def vanish(folder):
        (Path(folder) / gone).unlink()
        return whole(folder)
    monkeypatch.setattr(batch, "ledger_row", vanish)
    outcome = execute(plan(load_spec(lab / "toy.yaml"), "smoke"), device="cpu", home=lab, out=StringIO())
    ((_, reason),) = outcome.failed
    assert outcome.done == 0 and gone in reason and "has vanished; the same command makes the run again" in reason
    assert len(capsys.readouterr().err.splitlines()) == 1
