"""The ledger: what counts as a row, what a cut-off or forged file does, who may write at the same time."""
import json
import subprocess
import sys

import pytest
from filelock import Timeout

from lab_toys import make_row
from temp_nce.lab.ledger import Ledger, _curves, lock, read_row
from temp_nce.lab.run import RUNTIME, read_notebook, run_id
from temp_nce.lab.spec import find_home, find_specs, load_spec


def test_a_cut_off_last_line_is_dropped_and_nothing_else(tmp_path, capsys):
    ledger = Ledger("toy", tmp_path)
    names = [f"{number:012x}" for number in range(3)]
    for number in range(3): ledger.put(make_row(number, text="τ"))
    whole = ledger.path.read_bytes()
    # everywhere in the last line, also inside a character
    for cut in range(1, len(whole.splitlines(keepends=True)[-1])):
        ledger.path.write_bytes(whole[:-cut])
        kept = [row["id"] for row in ledger.rows()]
        assert kept == (names if cut == 1 else names[:2])
        assert ("cut off" in capsys.readouterr().err) is (cut > 1)
    ledger.put(make_row(2, text="τ"))
    assert ledger.path.read_bytes() == whole and [path.name for path in ledger.path.parent.iterdir()] == ["toy.jsonl"]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    ledger = Ledger("toy", tmp_path)
    for number in range(3): ledger.put(make_row(number))
    ledger.path.write_text(ledger.path.read_text().replace(json.dumps(make_row(1)), "<<<<<<< HEAD"))
    before = ledger.path.read_bytes()
    with pytest.raises(ValueError, match="line 2 is not a row of a ledger: <<<<<<< HEAD"): ledger.put(make_row(9))
    assert ledger.path.read_bytes() == before


def test_processes_that_record_at_the_same_time_lose_no_row(tmp_path):
    code = ("import sys; from temp_nce.lab import Ledger; ledger = Ledger('toy', sys.argv[1])\n"
            "row = {'spec': 'toy', 'scale': 'quick', 'parameters': {}}\n"
            "for i in range(20): ledger.put(row | {'id': f'{sys.argv[2]}{i % 10:011x}', 'metrics': {'i': i}})")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    rows = Ledger("toy", tmp_path).rows()
    assert sorted(row["id"] for row in rows) == sorted(f"{name}{i:011x}" for name in "abc" for i in range(10))
    assert all(row["metrics"]["i"] >= 10 for row in rows)


def test_a_lock_is_held_once(tmp_path):
    first = lock(tmp_path / "lock", wait=False)
    with pytest.raises(Timeout): lock(tmp_path / "lock", wait=False)
    first.release()
    with lock(tmp_path / "lock", wait=False) as again: assert again.is_locked
    assert not again.is_locked  # though the name still stands


def test_a_number_beyond_a_float_is_no_row(tmp_path):
    with pytest.raises(ValueError, match="1e999 is no finite number"): read_row(json.dumps(make_row()).replace(
        '"parameters": {}', '"parameters": {"lr": 1e999}'), "toy")


def test_curves_are_thinned_and_bear_a_cut_off_history(tmp_path):
    entries = [{"epoch": e, "loss": 1 / e, "knn": e if e % 10 == 0 else None} for e in range(1, 801)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries)
                                            + '{"epoch": 801, "lo')
    curves = _curves(tmp_path, ["loss", "knn", "absent"])
    assert set(curves) == {"loss", "knn"} and len(curves["loss"][0]) == 32 and len(curves["knn"][0]) == 32
    assert curves["loss"][0][0] == 1 and curves["loss"][0][-1] == 800 and curves["knn"][1][-1] == 800
    assert len(json.dumps(curves)) < 2000 and _curves(tmp_path / "nowhere", ["loss"]) == {}


def test_every_ledger_of_the_repository_is_whole(monkeypatch):
    monkeypatch.delenv("TEMP_NCE_HOME", raising=False)
    for path in (find_home() / "data" / "results").glob("*.jsonl"):
        text = path.read_text()
        ids = [json.loads(line)["id"] for line in text.splitlines()]
        assert len(ids) == len(set(ids)) and text.endswith("\n"), path
        assert max(map(len, text.splitlines()), default=0) < 4096, path


def test_every_recorded_run_keeps_its_name(monkeypatch):
    """Each row's id follows from its parameters; what a notebook takes beyond them has a neutral value, which is
    its default."""
    monkeypatch.delenv("TEMP_NCE_HOME", raising=False)
    specs = find_specs()
    for path in (find_home() / "data" / "results").glob("*.jsonl"):
        notebook = read_notebook(load_spec(path.stem).notebook) if path.stem in specs else None
        for row in Ledger(path.stem).rows():
            neutral = notebook.neutral if notebook else {}
            assert run_id(row["notebook"], row["parameters"], neutral) == row["id"], (path.name, row["id"])
            if not notebook: continue
            added = notebook.parameters.keys() - row["parameters"].keys() - set(RUNTIME)
            assert added <= notebook.neutral.keys(), (path.name, added)
            assert all(notebook.parameters[name] == notebook.neutral[name] for name in added)
            now = row["parameters"] | {name: notebook.neutral[name] for name in added}
            assert run_id(row["notebook"], now, notebook.neutral) == row["id"]


def test_histograms_fit_into_a_row(tmp_path):
    record = dict(pairs=[3_406_848] * 20, pairs_same=[567_808] * 20, push=[99.99] * 20, push_same=[9.99] * 20)
    (tmp_path / "history.jsonl").write_text("".join(json.dumps({"epoch": e, "loss": 1.234, **record}) + "\n"
                                                    for e in range(1, 41)))
    curves = _curves(tmp_path, ["loss", *record])
    assert all(curves[name] == [[1, 21, 40], [values] * 3] for name, values in record.items())
    assert len(json.dumps(curves)) < 2500 and len(curves["loss"][0]) == 32
    (tmp_path / "history.jsonl").write_text('{"epoch": 1, "pairs": [1, NaN]}\n{"epoch": 2, "pairs": ["a"]}\n')
    assert _curves(tmp_path, ["pairs"]) == {}
    row = make_row(1) | {"curves": {"pairs": [[1], [[1, 2]]]}}
    assert read_row(json.dumps(row), "toy") == row
    row["curves"]["pairs"][1] = ["a"]
    with pytest.raises(ValueError, match="curves"): read_row(json.dumps(row), "toy")
