"""Twelve toy runs on a Ray cluster that loses a machine, and as jobs of submitit: all rows, none twice."""
import threading
from io import StringIO

import pytest

from lab_toys import SPEC, lines, make_lab, wait_for
from temp_nce.lab.batch import execute
from temp_nce.lab.ledger import Ledger
from temp_nce.lab.run import plan
from temp_nce.lab.spec import load_spec

pytestmark = pytest.mark.slow
TWELVE = SPEC.replace("seed: [0, 1]", "seed: [0, 1, 2, 3, 4, 5]").replace("steps: 4", "steps: 10, fast: false")


def make_runs(lab, text=TWELVE):
    (lab / "toy.yaml").write_text(text)
    return plan(load_spec(lab / "toy.yaml"))


def start(make, times=4):
    "What `make` starts; on a busy machine Ray gives its own processes too little time now and then."
    for left in reversed(range(times)):
        try: return make()
        except Exception:
            if not left: raise


def check(lab, runs, outcome, said):
    rows = Ledger("toy", lab).rows()
    assert outcome.ok and outcome.done == 12, said
    assert sorted(row["id"] for row in rows) == sorted(run.id for run in runs) and len(rows) == 12
    assert said.count(": score ") == 12  # each was told once
    for run in runs: assert not list(run.folder(lab).glob(".*.tmp"))


def test_a_ray_cluster_that_loses_a_machine_makes_all_rows(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_agent_register_timeout_ms", "200000"),
                        ("RAY_raylet_start_wait_time_s", "200")): monkeypatch.setenv(name, value)
    # Ray takes 127.0.0.1 for the machine's outward address, where this cluster deliberately does not listen
    monkeypatch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)
    lab = make_lab(tmp_path)
    runs, out = make_runs(lab), StringIO()
    local = dict(num_cpus=1, node_ip_address="127.0.0.1", include_dashboard=False)
    cluster = start(lambda: Cluster(initialize_head=True, head_node_args=local))
    try:
        lost = start(lambda: cluster.add_node(**local))
        ray.init(address=cluster.address, _node_ip_address="127.0.0.1", log_to_driver=False)
        wait_for(lambda: ray.cluster_resources().get("CPU") == 2)
        def lose() -> None:
            wait_for(lambda: sum(lines(run.folder(lab) / "steps.txt") > 2 for run in runs) >= 4, 240)
            cluster.remove_node(lost, allow_graceful=False)
        threading.Thread(target=lose, daemon=True).start()
        outcome = execute(runs, on="ray", device="cpu", home=lab, out=out)
        check(lab, runs, outcome, out.getvalue())
        # the machine was lost on the way
        assert len(ray.nodes()) == 2 and sum(node["Alive"] for node in ray.nodes()) == 1
        assert "nothing left to do" in (execute(runs, on="ray", home=lab, out=(out := StringIO())), out.getvalue())[1]
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_jobs_of_submitit_make_all_rows(tmp_path):
    pytest.importorskip("submitit")
    lab = make_lab(tmp_path)
    runs = make_runs(lab)
    outcome = execute(runs, on="submitit", device="cpu", jobs=3, home=lab, out=(out := StringIO()))
    check(lab, runs, outcome, out.getvalue())
    assert "by local jobs" in out.getvalue() and not list((lab / "data/runs/.jobs").iterdir())
    assert "nothing left to do" in (execute(runs, on="submitit", home=lab, out=(out := StringIO())), out.getvalue())[1]


def test_a_job_that_fails_tells_why(tmp_path, capsys):
    pytest.importorskip("submitit")
    lab = make_lab(tmp_path)
    runs = plan(load_spec(lab / "toy.yaml"), "smoke", {"temperature": ["broken"]})
    assert not execute(runs, on="submitit", device="cpu", home=lab, out=StringIO()).ok
    assert "ValueError: temperature: broken is not known" in capsys.readouterr().err


def test_a_machine_without_the_folder_sends_the_files_back(tmp_path, monkeypatch):
    from temp_nce.lab.cluster import _receive, make_run
    from temp_nce.lab.worker import make_task
    lab, far = make_lab(tmp_path / "here") if (tmp_path / "here").mkdir() is None else None, tmp_path / "far"
    (run,) = plan(load_spec(lab / "toy.yaml"), "smoke")
    task = make_task(run, lab, remote=True)
    text = far / "data/runs/toy" / run.id  # another machine: the folder and the notebook lie elsewhere
    task = task | {"folder": str(text)}
    task["config"] = task["config"] | {"notebook": str(far / "toy.ipynb"),
                                       "runtime": task["config"]["runtime"] | {"run_dir": str(text)}}
    text.mkdir(parents=True)
    (text / "constant.txt").write_text("7")
    answer = make_run(task)
    assert answer["reason"] is None and not run.folder(lab).exists()
    assert _receive(answer, run.folder(lab)) is None and (run.folder(lab) / "metrics.json").exists()
    assert {"notebook.ipynb", "config.json", "env.json", "history.jsonl"} <= {path.name
                                                                              for path in run.folder(lab).iterdir()}
    assert "nothing left to do" in (execute([run], home=lab, out=(out := StringIO())), out.getvalue())[1]
    assert [row["id"] for row in Ledger("toy", lab).rows()] == [run.id]
