"""Graphs: the loss against GRACE's formula, views, encoder, loop, evaluators, and graphs that have something
missing."""
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

pytest.importorskip("torch_geometric", reason="torch_geometric is the extra `graph`")
from torch_geometric.data import Data

from temp_nce.graphs import (GRAPHS, GraphEncoder, GraphRecipe, GraphTask, block_graph, load_graph, mask_features,
                             measure_graph, node_splits,
                            pretrain_graph, pygcl_scores, remove_edges, sklearn_scores)
from temp_nce.graphs.data import _PARTS, _SHA256, _fetch_graph
from temp_nce.losses import nt_xent
from temp_nce.sources import places, sha256
from temp_nce.temperature import TemperatureFree

REPOSITORY = Path(__file__).resolve().parents[1]
CITESEER = next((place / "planetoid/CiteSeer" for place in places(REPOSITORY / "data")
                 if (place / "planetoid/CiteSeer").is_dir()), None)
needs_citeseer = pytest.mark.skipif(CITESEER is None, reason="CiteSeer is not in data/planetoid, nor in the folder "
                                    "that TEMP_NCE_DATA names")
SMALL = GraphRecipe(epochs=6, hidden=8, projection=8)


# ---- the loss is GRACE's

def grace(u, v, logit):
    "Zhu et al. 2020, Eq. 1 and 2, node by node; `logit` maps a cosine to theta / tau."
    def theta(a, b): return logit(torch.dot(a, b) / (a.norm() * b.norm()))
    def semi(u, v, i):
        positive = theta(u[i], v[i]).exp()
        between = sum(theta(u[i], v[k]).exp() for k in range(len(u)) if k != i)
        within = sum(theta(u[i], u[k]).exp() for k in range(len(u)) if k != i)
        return -torch.log(positive / (positive + between + within))
    return sum(semi(u, v, i) + semi(v, u, i) for i in range(len(u))) / (2 * len(u))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 9), d=st.integers(2, 6), tau=st.sampled_from((0.1, 0.25, 0.5, 1.0)), seed=st.integers(0, 10**6))
def test_loss_is_graces_formula_to_the_twelfth_digit(n, d, tau, seed):
    u, v = torch.randn(2, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    u.requires_grad_(), v.requires_grad_()
    ours, theirs = nt_xent(u, v, tau), grace(u, v, lambda c: c / tau)
    assert abs(ours - theirs) < 1e-12 * max(1, abs(theirs))
    for a, b in zip(torch.autograd.grad(ours, (u, v)), torch.autograd.grad(theirs, (u, v))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_temperature_free_is_graces_formula_with_the_other_logit():
    u, v = torch.randn(2, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    assert abs(nt_xent(u, v, TemperatureFree()) - grace(u, v, lambda c: 2 * torch.atanh(c))) < 1e-12


# ---- views

def seeded(seed=0): return torch.Generator().manual_seed(seed)


def test_views_drop_at_the_stated_rate_and_keep_the_rest():
    edges = torch.arange(20_000).view(2, -1)
    kept = remove_edges(edges, 0.3, seeded())
    assert abs(kept.shape[1] / 10_000 - 0.7) < 0.02
    assert set(map(tuple, kept.T.tolist())) <= set(map(tuple, edges.T.tolist()))
    x = torch.rand(5, 10_000) + 0.1
    masked = mask_features(x, 0.4, seeded())
    columns = (masked == x).all(0)
    assert (masked[:, ~columns] == 0).all() and abs(columns.float().mean() - 0.6) < 0.02


@pytest.mark.parametrize("p", (0.0, 0.5, 0.99))
def test_masking_sparse_features_is_masking_dense_ones(p):
    x = (torch.rand(30, 40, generator=seeded()) < 0.1).float()
    assert torch.equal(mask_features(x.to_sparse_csr(), p, seeded(1)).to_dense(), mask_features(x, p, seeded(1)))


# ---- graphs with something missing

def chain(nodes=12, features=20, edges=True):
    generator = seeded(5)
    one_way = torch.stack([torch.arange(nodes - 4), torch.arange(1, nodes - 3)])  # the last three nodes are isolated
    both = torch.cat([one_way, one_way.flip(0)], 1) if edges else torch.empty(2, 0, dtype=torch.int64)
    return Data(x=torch.rand(nodes, features, generator=generator), edge_index=both, y=torch.arange(nodes) % 2)


@pytest.mark.parametrize("sparse", (False, True))
def test_without_edges_a_convolution_is_a_linear_layer(sparse):
    data, encoder = chain(edges=False), GraphEncoder(20, 6)
    x = data.x.to_sparse_csr() if sparse else data.x
    expected = data.x
    for layer in encoder.layers: expected = torch.relu(layer.lin(expected) + layer.bias)
    torch.testing.assert_close(encoder(x, data.edge_index), expected)


def test_an_isolated_node_sees_only_itself():
    data, encoder = chain(), GraphEncoder(20, 6)
    alone = encoder(data.x[-1:], torch.empty(2, 0, dtype=torch.int64))
    torch.testing.assert_close(encoder(data.x, data.edge_index)[-1:], alone)


@pytest.mark.parametrize("temperature", ("0.5", "free", "dystress", "learnable", "macl", "isogclr", "uncertainty"))
@pytest.mark.parametrize("edges", (True, False))
def test_training_works_with_isolated_nodes_and_without_edges(temperature, edges):
    data = chain(edges=edges)
    data.x[-1] = 0  # an isolated node without words
    run = pretrain_graph(data, GraphRecipe(temperature=temperature, epochs=4, hidden=8, projection=8))
    assert run.embeddings.shape == (12, 8) and run.embeddings.isfinite().all()
    assert [record["epoch"] for record in run.history] == [1, 2, 3, 4]
    assert all(torch.tensor(record["loss"]).isfinite() for record in run.history)


@pytest.mark.parametrize("change, said", [
    (dict(x=None), "data.x: NoneType"), (dict(x=torch.ones(5)), r"data.x: \(torch.float32, \(5,\)\)"),
    (dict(x=torch.ones(5, 2).long()), "torch.int64"), (dict(x=torch.ones(12, 2).double()), "torch.float64"),
    (dict(x=torch.ones(12, 2).to_sparse_coo()), "layout torch.sparse_coo"),
    (dict(x=torch.full((12, 2), torch.nan)), "NaN"), (dict(edge_index=None), "data.edge_index: NoneType"),
    (dict(edge_index=torch.zeros(3, 4, dtype=torch.int64)), r"\(3, 4\)"),
    (dict(edge_index=torch.zeros(2, 4)), "torch.float32"),
    (dict(edge_index=torch.tensor([[0], [12]])), "nodes 0 to 12 came; give numbers from 0 to 11"),
    (dict(edge_index=torch.tensor([[-1], [2]])), "nodes -1 to 2")])
def test_a_graph_that_does_not_fit_together_is_refused(change, said):
    data = chain()
    parts = dict(x=data.x, edge_index=data.edge_index) | change
    with pytest.raises((TypeError, ValueError), match=said): pretrain_graph(Data(**parts), SMALL)


def test_an_unknown_activation_and_too_few_nodes_are_refused():
    with pytest.raises(ValueError, match="activation: 'gelu'"): GraphEncoder(4, activation="gelu")
    with pytest.raises(ValueError, match="nodes: 9"): node_splits(9, 0)
    with pytest.raises(ValueError, match="checkpoint_every: 0"): pretrain_graph(chain(), SMALL, checkpoint_every=0)
    z, y = torch.randn(20, 3), torch.arange(20) % 2
    with pytest.raises(ValueError, match="splits: their training nodes differ"):
        pygcl_scores(z, y, {"one": node_splits(20, 0)["swapped"], "other": node_splits(20, 1)["swapped"]})


@pytest.mark.parametrize("wrong, error", [
    (dict(epochs=0), "epochs: 0"), (dict(drop_edge_0=1.0), "drop_edge_0: 1.0"),
    (dict(drop_feature_1=-0.1), "drop_feature_1: -0.1"),
    (dict(activation="gelu"), "activation: 'gelu'"), (dict(temperature="hot"), "hot"),
    (dict(hidden=2.5), "hidden: 2.5")])
def test_wrong_recipes_are_refused(wrong, error):
    with pytest.raises((ValueError, TypeError), match=error): GraphRecipe(**wrong)


# ---- the loop

def test_sparse_and_dense_features_train_alike():
    data = block_graph()
    sparse = Data(x=data.x.to_sparse_csr(), edge_index=data.edge_index)
    one, other = (pretrain_graph(each, SMALL) for each in (data, sparse))
    torch.testing.assert_close(one.embeddings, other.embeddings, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", ("free", "learnable", "isogclr"))
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(temperature, tmp_path, monkeypatch):
    data, recipe = block_graph(), GraphRecipe(temperature=temperature, epochs=9, hidden=8, projection=8)
    whole = pretrain_graph(data, recipe)
    begin = GraphTask.begin_epoch
    def power_cut(task, epoch, epochs):
        if epoch == 7: raise KeyboardInterrupt
        begin(task, epoch, epochs)
    monkeypatch.setattr(GraphTask, "begin_epoch", power_cut)
    with pytest.raises(KeyboardInterrupt): pretrain_graph(data, recipe, folder=tmp_path, checkpoint_every=3)
    monkeypatch.undo()
    again = pretrain_graph(data, recipe, folder=tmp_path, resume=True, checkpoint_every=3)
    timeless = lambda history: [{name: value for name, value in record.items() if name != "seconds"}
                                for record in history]
    assert torch.equal(whole.embeddings, again.embeddings) and whole.alignment == again.alignment
    assert timeless(whole.history) == timeless(again.history)
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == again.history


@pytest.mark.parametrize("change", ("words", "columns"))
def test_another_sparse_graph_is_refused_in_the_same_folder(change, tmp_path):
    data = block_graph()
    other = data.x.flip(1) if change == "words" else torch.nn.functional.pad(data.x, (0, 5))
    pretrain_graph(Data(x=data.x.to_sparse_csr(), edge_index=data.edge_index), SMALL, folder=tmp_path)
    with pytest.raises(ValueError, match="another recipe or other data"):
        pretrain_graph(Data(x=other.to_sparse_csr(), edge_index=data.edge_index), SMALL, folder=tmp_path, resume=True)


def test_another_graph_or_recipe_is_refused_in_the_same_folder(tmp_path):
    pretrain_graph(block_graph(), SMALL, folder=tmp_path)
    with pytest.raises(ValueError, match="another recipe or other data"):
        pretrain_graph(block_graph(seed=1), SMALL, folder=tmp_path, resume=True)
    other = GraphRecipe(epochs=6, hidden=8, projection=8, seed=1)
    with pytest.raises(ValueError, match="another recipe or other data"):
        pretrain_graph(block_graph(), other, folder=tmp_path, resume=True)


# ---- evaluation

@pytest.mark.parametrize("nodes", (10, 57, 3327))
def test_splits_share_their_training_nodes_and_cover_all(nodes):
    splits = node_splits(nodes, seed=3)
    for train, valid, test in splits.values():
        assert torch.cat([train, valid, test]).sort().values.tolist() == list(range(nodes))
    swapped, intended = splits["swapped"], splits["intended"]
    assert torch.equal(swapped[0], intended[0]) and len(swapped[0]) == nodes // 10
    assert len(swapped[1]) == int(0.8 * nodes) == len(intended[2])
    assert not torch.equal(node_splits(nodes, seed=4)["swapped"][0], swapped[0])


def lr_evaluator(z, y, split, seed, epochs, every):
    "PyGCL's LREvaluator, transcribed."
    train, valid, test = split
    torch.manual_seed(seed)
    classifier = torch.nn.Linear(z.shape[1], int(y.max()) + 1)
    torch.nn.init.xavier_uniform_(classifier.weight.data)
    classifier.bias.data.fill_(0.0)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01, weight_decay=0.0)
    best_valid, result = 0, (0, 0)
    for epoch in range(epochs):
        optimizer.zero_grad()
        torch.nn.NLLLoss()(torch.nn.LogSoftmax(-1)(classifier(z[train])), y[train]).backward()
        optimizer.step()
        if (epoch + 1) % every: continue
        scores = {name: f1_score(y[rows], classifier(z[rows]).argmax(-1).detach(), average=name)
                  for rows, name in ((test, "micro"), (test, "macro"))}
        micro = f1_score(y[valid], classifier(z[valid]).argmax(-1).detach(), average="micro")
        if micro > best_valid: best_valid, result = micro, (scores["micro"], scores["macro"])
    return result


def test_pygcl_scores_are_the_evaluators():
    data = block_graph(seed=2)
    z = pretrain_graph(data, SMALL).embeddings
    splits = node_splits(len(z), 1)
    ours = pygcl_scores(z, data.y, splits, seed=7, epochs=200)
    for name, split in splits.items(): assert ours[name] == pytest.approx(lr_evaluator(z, data.y, split, 7, 200, 20))


def test_separable_embeddings_score_one_and_shuffled_labels_score_chance():
    y = torch.arange(300) % 3
    z = torch.eye(3)[y] + 0.01 * torch.randn(300, 3, generator=seeded())
    metrics = measure_graph(z, y)
    assert all(value == 1 for name, value in metrics.items() if name.startswith("f1_")) and len(metrics) == 10
    shuffled = sklearn_scores(z, y[torch.randperm(300, generator=seeded(1))], node_splits(300, 0))
    assert shuffled["intended"][0] < 0.5


# ---- data

def test_unknown_and_missing_data_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMP_NCE_DATA", "")
    says = "'CiteSear' is no graph; give one of Cora, CiteSeer, PubMed"
    with pytest.raises(ValueError, match=says): load_graph("CiteSear", tmp_path)
    def unplugged(*arguments): raise OSError("no network")
    monkeypatch.setattr("temp_nce.graphs.data.download", unplugged)
    says = "CiteSeer: no folder planetoid/CiteSeer in .* the download failed .*no network.*TEMP_NCE_DATA"
    with pytest.raises(FileNotFoundError, match=says) as error: load_graph("CiteSeer", tmp_path / "data")
    assert "\n" not in str(error.value) and not any((tmp_path / "data").iterdir())
    (tmp_path / "planetoid/Cora/raw").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="ind.cora.x: missing"): load_graph("cora", tmp_path)


def test_every_published_file_has_a_sum_and_a_secure_address(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("temp_nce.graphs.data.download", lambda *arguments: asked.append(arguments))
    for name in GRAPHS: _fetch_graph(name, tmp_path)
    assert len(asked) == 24 == len({url for url, _, _ in asked})
    assert all(url.startswith("https://github.com/kimiyoung/planetoid/raw/master/data/ind.") for url, _, _ in asked)
    assert all(re.fullmatch("[0-9a-f]{64}", published) for _, published, _ in asked)
    assert asked[8][2] == tmp_path / "planetoid/CiteSeer/raw/ind.citeseer.x"


@needs_citeseer
def test_citeseer_is_what_was_published():
    before = sorted(CITESEER.rglob("*"))
    data = load_graph("citeseer", CITESEER.parents[1])
    assert data.x.shape == (3327, 3703) and data.num_edges == 9104 and int(data.y.max()) == 5
    assert int((data.edge_index[0].bincount(minlength=3327) == 0).sum()) == 48
    sums = data.x.to_dense().sum(1)
    assert (torch.isclose(sums, torch.ones(()), atol=1e-5) | (sums == 0)).all() and (sums == 0).sum() == 15
    assert sorted(CITESEER.rglob("*")) == before  # reading leaves nothing behind


@needs_citeseer
def test_citeseer_is_to_the_bit_what_the_recorded_runs_saw():
    data = load_graph("citeseer", CITESEER.parents[1])
    parts = (data.x.crow_indices(), data.x.col_indices(), data.x.values(), data.edge_index, data.y)
    assert [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in parts] == [
        "e34e859acab87f76", "e8e13785132ae117", "008d85419358d900", "0826c26dc48439ab", "448f8c04e02516b2"]


@needs_citeseer
@pytest.mark.parametrize("damage", ("cut", "empty", "words", "one bit"))
def test_damaged_files_are_refused_by_name(damage, tmp_path):
    shutil.copytree(CITESEER / "raw", tmp_path / "planetoid/CiteSeer/raw")
    path = tmp_path / "planetoid/CiteSeer/raw/ind.citeseer.allx"
    path.chmod(0o644)
    raw = path.read_bytes()
    flipped = raw[:-99] + bytes([raw[-99] ^ 1]) + raw[-98:]
    path.write_bytes({"cut": raw[:1000], "empty": b"", "words": b"not a pickle at all", "one bit": flipped}[damage])
    with pytest.raises(ValueError, match="raw/ind.citeseer.allx: SHA-256 .*get the file again from https") as error:
        load_graph("CiteSeer", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("known", (False, True))  # True: as if the table of sums itself were wrong
@pytest.mark.parametrize("name", GRAPHS)
def test_a_planted_file_is_refused_in_one_line_and_nothing_is_executed(name, known, tmp_path, monkeypatch):
    class Planted:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/owned",)
    raw = tmp_path / "planetoid" / name / "raw"
    raw.mkdir(parents=True)
    for piece in _PARTS: (raw / f"ind.{name.lower()}.{piece}").write_bytes(pickle.dumps(Planted(), protocol=2))
    sums = " ".join(sha256(raw / f"ind.{name.lower()}.{piece}") for piece in _PARTS)
    if known: monkeypatch.setitem(_SHA256, name, sums)
    with pytest.raises(ValueError, match="imports 'posix system'" if known else "SHA-256") as error:
        load_graph(name, tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_smoke_run_on_a_graph_made_here(tmp_path):
    environment = os.environ | {"TEMP_NCE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from temp_nce.lab.cli import main; main()", "run", "citeseer", "--scale",
               "smoke", "--device", "cpu", "--set", "dataset=blocks", "--set", "temperature=free"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    row, = (json.loads(line) for line in (tmp_path / "data/results/citeseer.jsonl").read_text().splitlines())
    assert row["set"]["dataset"] == "blocks" and row["parameters"]["temperature"] == "free"
    assert 0 <= row["metrics"]["f1_micro_swapped_pygcl"] <= 1 and (tmp_path / "data/runs/citeseer" / row["id"]
                                                                   / "embeddings.npz").exists()


# ---- the caller's graph, and baselines

def test_the_callers_graph_stays_where_it_is():
    data = block_graph()
    before = data.x
    pretrain_graph(data, SMALL, device="cpu")
    assert data.x is before and data.x.device.type == "cpu"
    moved = __import__("copy").copy(data).to("meta")  # what pretrain_graph does with another device
    assert moved.x.is_meta and not data.x.is_meta


@pytest.mark.parametrize("name", ("raw", "untrained"))
def test_graph_baselines_are_measured_and_not_trained(name):
    data = block_graph()
    result = pretrain_graph(data, GraphRecipe(temperature=name, hidden=8, projection=8))
    assert result.history == [] and result.embeddings.shape == (150, 60 if name == "raw" else 8)
    if name == "raw": assert torch.equal(result.embeddings, data.x)


@pytest.mark.parametrize("spec", ("free", "isogclr"))
def test_histograms_change_no_bit(spec):
    data = block_graph(60, seed=1)
    recipes = [GraphRecipe(temperature=spec, epochs=5, hidden=8, projection=8, histogram_every=n) for n in (0, 2)]
    plain, watched = (pretrain_graph(data, recipe, device="cpu") for recipe in recipes)
    assert torch.equal(plain.embeddings, watched.embeddings) and plain.alignment == watched.alignment
    assert [record["loss"] for record in plain.history] == [record["loss"] for record in watched.history]
    assert [record["epoch"] for record in watched.history if "pairs_same" in record] == [2, 4, 5]
    assert sum(watched.history[-1]["pairs"]) == 120 * 118
    assert ("push_same" in watched.history[-1]) is (spec == "free")
    with pytest.raises(ValueError, match="histogram_every"): GraphRecipe(histogram_every=-1)


def test_the_regularisation_is_chosen_on_the_validation_nodes():
    y = torch.arange(200) % 3
    z = torch.eye(3)[y] + torch.randn(200, 3, generator=seeded())
    x, splits = torch.nn.functional.normalize(z.double()), node_splits(200, 1)
    found = sklearn_scores(z, y, splits)
    for name, (train, valid, test) in splits.items():
        fits = [LogisticRegression(C=2.0**k, max_iter=1000).fit(x[train], y[train]) for k in range(-10, 10)]
        best = max(fits, key=lambda fit: fit.score(x[valid], y[valid]))
        assert found[name][0] == pytest.approx(best.score(x[test], y[test]))
    assert measure_graph(z, y, 1)["f1_micro_swapped_sklearn"] == pytest.approx(found["swapped"][0])
