"""The wheel, installed into an empty environment outside any clone, runs an experiment."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def find_python(uv, version: str, env: dict) -> str | None:
    "An interpreter of this version: the running one, one that pyenv holds, or one that uv finds without a download."
    if sys.version.startswith(f"{version}."): return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    held = sorted(pyenv.glob(f"{version}.*/bin/python"))
    ask = [str(uv), "python", "find", "--no-python-downloads", version]
    found = subprocess.run(ask, capture_output=True, text=True, env=env)
    return str(held[-1]) if held else None if found.returncode else found.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("version", ("3.10", "3.13"))  # the oldest and the newest that pyproject.toml admits
def test_the_wheel_runs_an_experiment_outside_a_clone(version, tmp_path):
    names = ("PYTHONPATH", "VIRTUAL_ENV", "TEMP_NCE_HOME", "IN_TEST")
    env = {name: value for name, value in os.environ.items() if name not in names}
    def shell(*words, cwd=tmp_path):
        words = [str(word) for word in words]
        answer = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
        assert answer.returncode == 0, answer.stderr[-3000:]
        return answer.stdout
    uv = next((path for path in (Path(sys.executable).with_name("uv"),) if path.exists()), "uv")
    shell(uv, "build", "--wheel", "--out-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    interpreter = find_python(uv, version, env)
    if interpreter is None: pytest.skip(f"Python {version} is not on this machine")
    shell(uv, "venv", "--python", interpreter, tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    shell(uv, "pip", "install", "--python", python, "-c", ROOT / "constraints.txt", wheel)
    work = tmp_path / "work"
    work.mkdir()
    where = shell(python, "-c", "import temp_nce; from temp_nce import NTXentLoss; print(temp_nce.__file__)", cwd=work)
    assert where.startswith(str(tmp_path / "env"))
    command = tmp_path / "env" / "bin" / "temp-nce"
    assert "digits" in shell(command, "list", cwd=work)
    out = shell(command, "run", "digits", "--scale", "smoke", "--device", "cpu", cwd=work)
    assert "2 of 2 runs are done" in out
    assert len((work / "data" / "results" / "digits.jsonl").read_text().splitlines()) == 2
    assert "nothing left to do" in shell(command, "run", "digits", "--scale", "smoke", cwd=work)
