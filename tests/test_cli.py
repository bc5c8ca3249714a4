"""The command temp-nce as a shell sees it: output, one-line errors, exit statuses."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab_toys import SPEC, make_lab, make_row
from temp_nce.lab import Ledger, load_spec, plan


def temp_nce(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    code = "import sys; from temp_nce.lab.cli import main; main(sys.argv[1:])"
    answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd,
                            env=os.environ | environment, timeout=180)
    return answer.returncode, answer.stdout, answer.stderr


def make_repository(folder: Path) -> Path:
    "A folder that the command takes for the repository."
    (folder / "settings.ini").touch()
    (folder / "nbs" / "experiments").mkdir(parents=True)
    make_lab(folder / "nbs" / "experiments")
    return folder


@pytest.fixture
def repository(tmp_path) -> Path: return make_repository(tmp_path)


MISTAKES = [  # command line, exit status, what the one line says
    (["run", "toi"], 2, "unknown spec toi; did you mean toy?"),
    (["run", "toy", "--scale", "quik"], 2, "toy: unknown scale quik; did you mean quick?"),
    (["run", "toy", "--set", "temprature=1"], 2, "--set: unknown parameter temprature; did you mean temperature?"),
    (["run", "toy", "--set", "steps"], 2, "--set: expected name=value, got steps"),
    (["run", "toy", "--set", "steps=many"], 2, "--set: steps: expected int"),
    (["run", "toy", "--device", "tpu"], 2, "device: expected auto, cpu, cuda or cuda:N, got tpu"),
    (["run", "toy", "--jobs", "0"], 2, "jobs: expected a whole number above 0, got 0"),
    (["run", "toy", "--jobs", "two"], 2, "Invalid value for '--jobs'"),
    (["run"], 2, "which experiment? known: toy"),
    (["run", "--id", "beef"], 2, "id: 0 rows in"),
    (["run", "toy", "--id", "beef"], 2, "leave out SPEC and --set"),
    (["report", "toi"], 2, "unknown spec toi; did you mean toy?"),
    (["fly"], 2, "No such command 'fly'"),
]


@pytest.mark.parametrize("arguments, status, message", MISTAKES)
def test_a_mistake_is_one_line_on_stderr(repository, arguments, status, message):
    code, out, err = temp_nce(*arguments, cwd=repository)
    assert code == status and not out and message in err, (code, out, err)
    assert len(err.splitlines()) == 1 and err.startswith("temp-nce: ")
    assert not (repository / "data" / "runs").exists()


@pytest.mark.parametrize("broken", ["data", "data/runs", "data/runs/toy"])
def test_a_run_folder_that_cannot_be_written_is_one_line(repository, broken):
    path = repository / broken
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file where a folder should be")  # what holds for a superuser too, who may write everywhere
    code, out, err = temp_nce("run", "toy", "--scale", "smoke", "--device", "cpu", cwd=repository)
    assert code == 1 and len(err.splitlines()) == 1 and str(path) in err and "Traceback" not in err, err


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write everywhere")
def test_a_read_only_home_is_one_line(repository):
    (repository / "data").mkdir(mode=0o555)
    code, _, err = temp_nce("run", "toy", "--scale", "smoke", "--device", "cpu", cwd=repository)
    assert code == 1 and len(err.splitlines()) == 1 and "Permission denied" in err


def test_help_and_version_and_no_arguments(repository):
    for arguments in (["--help"], ["run", "--help"], ["report", "--help"], ["list", "--help"]):
        code, out, err = temp_nce(*arguments, cwd=repository)
        assert code == 0 and "Usage: temp-nce" in out and not err
    from temp_nce import __version__
    assert temp_nce("--version", cwd=repository)[:2] == (0, f"temp_nce {__version__}\n")
    code, out, _ = temp_nce(cwd=repository)
    assert code == 2 and "list" in out and "run" in out and "report" in out


def test_the_command_starts_quickly_and_without_torch():
    code = ("import time; start = time.process_time(); import sys, temp_nce.lab.cli; "
            "print(time.process_time() - start, 'torch' in sys.modules)")
    seconds, torch = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert torch == "False" and float(seconds) < 1


def test_list_shows_titles_and_counts_and_a_broken_spec(repository):
    code, out, err = temp_nce("list", cwd=repository)
    assert code == 0 and not err and out.splitlines()[1].split() == ["toy", "0/1", "0/4", "–", "0/4", "A", "toy"]
    (run, *_) = plan(load_spec(repository / "nbs" / "experiments" / "toy.yaml"), "quick")
    Ledger("toy", repository).put(make_row(id=run.id))
    (repository / "nbs" / "experiments" / "wrong.yaml").write_text(SPEC.replace("title", "titel"))
    code, out, err = temp_nce("list", cwd=repository)
    assert code == 1 and "1/4" in out and err.splitlines() == ["temp-nce: wrong.yaml: unknown key titel; did you mean "
                                                               "title?"]


@pytest.mark.slow
def test_run_repeat_force_and_report_end_to_end(repository, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    # from a folder inside the repository, writing elsewhere
    here = dict(cwd=repository / "nbs", TEMP_NCE_HOME=str(home))
    code, out, err = temp_nce("run", "toy", "--scale", "smoke", "--device", "cpu", **here)
    assert (code, err) == (0, "") and "1 of 1 runs are done" in out and not (repository / "data").exists()
    (row,) = Ledger("toy", home).rows()

    code, out, err = temp_nce("run", "--id", row["id"][:8], **here)
    assert (code, err) == (0, "") and "the metrics equal the recorded ones to the last digit" in out
    runs = home / "data" / "runs" / "toy"
    assert (runs / f"{row['id']}-repeat1" / "metrics.json").exists() and Ledger("toy", home).rows() == [row]

    Ledger("toy", home).put(row | {"metrics": row["metrics"] | {"score": 0.123}})
    (runs / row["id"] / "left-over").touch()
    code, out, err = temp_nce("run", "toy", "--scale", "smoke", "--device", "cpu", "--force", **here)
    assert (code, err) == (0, "") and f"largest change of score: 0.123 → {row['metrics']['score']:.4g}" in out
    (again,) = Ledger("toy", home).rows()
    assert (again["metrics"] == row["metrics"] and again["attempts"] == 1
            and not (runs / row["id"] / "left-over").exists())

    code, out, err = temp_nce("report", "toy", **here)
    assert (code, err) == (0, "") and "smoke scale" in out and "1 of 1 runs stand in the ledger" in out
    assert out.endswith(f"written: {home / 'figures' / 'report.html'}\n")
    assert "temp-nce run toy --scale smoke" in (home / "figures" / "report.html").read_text()
