"""Recommendation: logs, graphs, the model's terms against the published code's formulas, ranks, training, speed."""
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recommend_plain as plain
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from temp_nce import sources
from temp_nce.losses import InfoNCELoss
from temp_nce.recommend import (LOGS, Candidates, DCRec, RecommendRecipe, RecommendTask, check_parameters,
                                draw_candidates, hit_rate, keep_users, list_ranks, load_log, make_log, ndcg, popularity,
                                popularity_ranks, rank_metrics, read_logs, similarity_graph, toy_log, train_recommender,
                                transition_graph)
from temp_nce.recommend import data, model, training
from temp_nce.recommend.data import question_rows, training_rows
from temp_nce.recommend.links import _Spread, convolution_weights, drop_edges, light_convolution
from temp_nce.recommend.model import Layer, dropout
from temp_nce.recommend.ranks import by_popularity, paired_gap, places, user_differences
from temp_nce.recommend.terms import (conformity, contrastive_term, draw_neighbours, shape_term, steps_of,
                                      without_users)
from temp_nce.sources import places as data_places
from temp_nce.temperature import make_temperature

REPOSITORY = Path(__file__).resolve().parents[1]
HOME = next((place / "dcrec" for place in data_places(REPOSITORY / "data") if (place / "dcrec/reddit").is_dir()), None)
needs_logs = pytest.mark.skipif(HOME is None, reason="Reddit is not in data/dcrec, nor in the folder that "
                                "TEMP_NCE_DATA names")
HEAD = "session_id:token\titem_id_list:token_seq\titem_id:token"
QUIET = dict(hidden=8, inner=16, drop=0.0, drop_attention=0.0, drop_edge=0.0, batch_size=64)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def task_of(log, seed=0, **recipe):
    return RecommendTask(RecommendRecipe(**{**QUIET, "seed": seed, **recipe}), log, torch.device("cpu"),
                         draw_candidates(log, k=20))


def histories(log, back=2): return [log[user][:-back] for user in range(len(log))]


# ---- every term against the published formulas

def striped(x, p, *_):
    "In the place of dropout: every other entry along the last axis is made larger by the share p, the others smaller."
    return x * (1 + p * (1 - 2 * (torch.arange(x.shape[-1]) % 2))).to(x.dtype)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("tau", ("0.8", "0.1", "free", "dystress"))
@pytest.mark.parametrize("neighbours", ("mended", "published"))
def test_a_step_is_the_published_one_to_the_tenth_digit(tau, neighbours, masked, monkeypatch):
    log = toy_log(60, 24, seed=5)
    if masked:  # the same vectors and weights are masked, each with its own share
        monkeypatch.setattr(model, "dropout", striped)
        monkeypatch.setattr(plain.F, "dropout", striped)
    shares = dict(drop=0.3, drop_attention=0.6) if masked else {}
    task = task_of(log, temperature=tau, neighbours=neighbours, **shares)
    task.model.double()
    for world in (task.world, task.later):
        for name, graph in list(world.graphs.items()):
            graph = replace(graph, weight=graph.weight.double())
            setattr(world, name, graph)
            world.weights[name] = convolution_weights(graph)
    batch = torch.randperm(len(task.rows), generator=seeded(1))[:64]
    state = task.generators["noise"].get_state()
    drawn, wanted = record(task, batch)
    task.generators["noise"].set_state(state)
    values = task.objective(task.forward(batch) | {"wanted": wanted}, batch)
    values["loss"].backward()
    ours = {name: weight.grad.clone() for name, weight in task.model.named_parameters()}
    adj, edges = plain.build_adj_graph(histories(log), log.n)
    graphs = [plain.Graph(adj, log.n, torch.float64),
              plain.Graph(plain.build_sim_graph(histories(log), log.n, 4), log.n, torch.float64)]
    for graph in graphs: graph.w = graph.w.float().double()  # the graphs of a task are in single precision
    task.model.zero_grad()
    terms = plain.calculate_loss(task.model, graphs, edges, plain.padded(log, task.rows[batch], 50), task.recipe,
                                 make_temperature(tau), wanted, drawn)
    for name in ("next_item", "contrast", "shape"): assert abs(values[name] - terms[name]) < 1e-10, name
    (terms["next_item"] + terms["contrast"] + terms["shape"]).backward()
    # the temperature-free map of this package adds up to 1e-6 to gaps where negatives coincide, see its docstring
    close = dict(rtol=1e-6, atol=1e-8) if tau == "free" else dict(rtol=1e-8, atol=1e-11)
    for name, weight in task.model.named_parameters(): torch.testing.assert_close(ours[name], weight.grad, **close)


def record(task, batch):
    "The neighbours and the normal numbers that a step draws: those sets, row by row, and the numbers."
    seen, original = {}, training.draw_neighbours
    def spy(*arguments):
        seen["drawn"] = original(*arguments)
        return seen["drawn"]
    training.draw_neighbours = spy
    try: out = task.forward(batch)
    finally: training.draw_neighbours = original
    return [[set(row) - {0} for row in part.tolist()] for part in seen["drawn"]], out["wanted"].double()


def timed(call, seconds):
    "The same call, which writes down its CPU time."
    def wrapped(*arguments):
        begun = time.process_time()
        try: return call(*arguments)
        finally: seconds.append(time.process_time() - begun)
    return wrapped


@needs_logs
@pytest.mark.slow
def test_a_step_is_at_least_twice_as_fast_as_the_plain_one_and_its_losses_are_equal(monkeypatch):
    log = keep_users(load_log("reddit", HOME.parent), 4829)
    task = task_of(log, hidden=64, inner=256, batch_size=512)
    loud = replace(task.recipe, drop=0.5, drop_attention=0.5, drop_edge=0.5)
    adj, edges = plain.build_adj_graph(histories(log), log.n)
    likes = task.world.likes
    sim = dict(zip(zip(likes.senders.tolist(), likes.receivers.tolist()), likes.weight.tolist()))
    graphs = [plain.Graph(adj, log.n), plain.Graph(sim, log.n)]
    batches = torch.randperm(len(task.rows), generator=seeded()).split(512)
    state = task.generators["noise"].get_state()
    drawn, wanted = record(task, batches[0])
    task.generators["noise"].set_state(state)
    ours = task.objective(task.forward(batches[0]), batches[0])
    theirs = plain.calculate_loss(task.model, graphs, edges, plain.padded(log, task.rows[batches[0]]), task.recipe,
                                  make_temperature("0.8"), wanted.float(), drawn)
    for name in ("next_item", "contrast", "shape"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)
    task.recipe, task.model.drop, task.model.encoder.drop = loud, 0.5, 0.5
    for layer in task.model.encoder.layers: layer.drop = layer.drop_attention = 0.5

    def fast(batch): return task.objective(task.forward(batch), batch)["loss"]
    def slow(batch):
        terms = plain.calculate_loss(task.model, graphs, edges, plain.padded(log, task.rows[batch], 50), loud,
                                     make_temperature("0.8"))
        return terms["next_item"] + terms["contrast"] + terms["shape"]
    spent, loops = {fast: [], slow: []}, []
    for name in ("graph_augment", "readout"): monkeypatch.setattr(plain, name, timed(getattr(plain, name), loops))
    for batch in batches[1:8]:
        for way, seconds in spent.items():
            begun = time.process_time()
            task.optimizer.zero_grad(set_to_none=True)
            way(batch).backward()
            task.optimizer.step()
            seconds.append(time.process_time() - begun)
    medians = {way.__name__: sorted(seconds)[len(seconds) // 2] for way, seconds in spent.items()}
    print({name: round(seconds, 3) for name, seconds in medians.items()}, round(medians["slow"] / medians["fast"], 2),
          "of the slow one in loops over neighbours:", round(sum(loops) / 7, 3))
    assert medians["slow"] > 2 * medians["fast"]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 9), width=st.integers(2, 6), tau=st.sampled_from(("0.1", "0.8", "free", "cosine")),
       seed=st.integers(0, 10**6))
def test_the_contrastive_term_is_the_published_one(rows, width, tau, seed):
    s, a, b = torch.randn(3, rows, width, dtype=torch.float64, generator=seeded(seed)).unbind()
    w = torch.rand(rows, dtype=torch.float64, generator=seeded(seed + 1))
    cosines = torch.stack([normalize(x, dim=1) @ normalize(y, dim=1).T for x, y in ((s, a), (a, b))])
    assume(cosines.abs().max() < 1 - 1e-4)  # nearer to the ends the losses differ on purpose, see nbs/00_weights
    logit = make_temperature(tau)
    theirs = (w * plain.vanilla_loss(s, a, logit) + (w.max() - w) * plain.vanilla_loss(a, b, logit)).mean()
    assert abs(contrastive_term(InfoNCELoss(tau, reduction="none"), s, a, b, w) - theirs) < 1e-10 * max(1, abs(theirs))


def test_the_weight_and_its_shape_are_the_published_ones():
    vectors = torch.randn(4, 30, 6, dtype=torch.float64, generator=seeded())
    lengths = torch.randint(1, 5, (30,), generator=seeded())
    ours, theirs = conformity(*vectors, lengths, 0.4), plain.agreement(*vectors, lengths, 0.4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    wanted = 0.1 + 0.3 * torch.randn(30, dtype=torch.float64, generator=seeded(1))  # some below zero
    assert (wanted < 0).any()
    assert abs(shape_term(ours, wanted) - plain.cal_kl_1(wanted.sort()[0], ours.sort()[0])) < 1e-12


def test_a_batch_of_one_history_is_trained_on():
    task = task_of(toy_log(20, 12))
    values = task.objective(task.forward(torch.tensor([3])), torch.tensor([3]))
    assert all(torch.isfinite(value) for value in values.values()) and abs(values["contrast"]) < 1e-6
    values["loss"].backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in task.model.parameters())


# ---- graphs

ODD = {"toy": toy_log(80, 24, seed=3), "cycles": make_log([[1, 2, 3, 1, 2, 3, 1, 9, 9], [2, 1, 2, 1, 2, 5, 6]]),
       "the same columns": make_log([[*range(1, 8), 8, 9]] * 2 + [[8, 9, 10, 11]]),
       "twice in a row": make_log([[1, 1, 2, 2, 2, 7, 8], [3, 1, 1, 8, 7]]),
       "one step": make_log([[1, 2, 3], [3, 2, 1]])}


@pytest.mark.parametrize("name", ODD)
def test_graphs_are_those_of_loops(name):
    log = ODD[name]
    def dense(edges):
        matrix = torch.zeros(log.n + 1, log.n + 1)
        for (a, b), weight in edges.items(): matrix[b, a] = weight
        return matrix
    for back in (1, 2):
        adj, _ = plain.build_adj_graph(histories(log, back), log.n)
        assert len(transition_graph(log, back).senders) == len(adj)
        torch.testing.assert_close(transition_graph(log, back).dense(), dense(adj))
        likes = similarity_graph(log, 4, back)
        torch.testing.assert_close(likes.dense(), dense(plain.build_sim_graph(histories(log, back), log.n, 4)))
        assert (likes.starts.diff() <= 5).all()


def edges_of(graph): return dict(zip(zip(graph.senders.tolist(), graph.receivers.tolist()), graph.weight.tolist()))


@pytest.mark.parametrize("items", (24, 1200))  # one block of the published loop, and three
def test_the_published_similarity_graph_is_that_of_its_loop(items):
    log = toy_log(800, items, seed=2)
    expected = plain.build_published_sim_graph(histories(log), log.n, 4)
    ours = similarity_graph(log, 4, published=True)
    assert edges_of(ours) == pytest.approx(expected)
    assert not torch.equal(ours.dense(), similarity_graph(log, 4).dense())


@pytest.mark.parametrize("similarity", ("mended", "published"))
def test_no_graph_holds_the_item_that_is_asked_for(similarity, monkeypatch):
    log = toy_log(80, 24, seed=3)
    task, asked, views = task_of(log, similarity=similarity), [], training.World.views
    plain_likes = {"mended": plain.build_sim_graph, "published": plain.build_published_sim_graph}[similarity]
    for world, back in ((task.world, 2), (task.later, 1)):  # 2: neither of the last two, 1: not the last one
        adj, _ = plain.build_adj_graph(histories(log, back), log.n)
        for graph, edges in ((world.transitions, adj), (world.likes, plain_likes(histories(log, back), log.n, 4))):
            assert edges_of(graph) == pytest.approx(edges)
    monkeypatch.setattr(training.World, "views", lambda world, *rest: asked.append(world) or views(world, *rest))
    task.forward(torch.arange(8)), task.answer(2), task.answer(1)
    assert [world is task.later for world in asked] == [False, False, True]


@pytest.mark.parametrize("name", ODD)
def test_users_are_taken_out_of_the_graph_as_published(name):
    log = ODD[name]
    graph, (adj, edges) = transition_graph(log), plain.build_adj_graph(histories(log), log.n)
    users = torch.arange(min(3, len(log)))
    left = without_users(graph, steps_of(log, graph), users)
    whole = plain.Graph(adj, log.n)
    aug = plain.graph_augment(whole, users.tolist(), edges)
    pairs = lambda a, b: sorted(zip(a.tolist(), b.tolist()))
    assert pairs(graph.senders[left], graph.receivers[left]) == pairs(aug.src, aug.dst)
    items, mixed = log.items.unique(), set()
    for published in (False, True):
        foreign, civil = draw_neighbours(graph, left, items, 100, seeded(), published)  # 100: all of them
        for item, one, other in zip(items.tolist(), foreign.tolist(), civil.tolist()):
            assert set(one) - {0} == set(aug.out_edges([item])[0])
            assert set(other) - {0} == set(whole.out_edges([item])[0]) - set(aug.out_edges([item])[0])
        for item, *drawn in zip(items.tolist(), *(each.tolist() for each in draw_neighbours(
                graph, left, items, 2, seeded(), published))):
            one, other = (set(row) - {0} for row in drawn)
            everything, stayed = (set(each.out_edges([item])[0]) for each in (whole, aug))
            rest = everything - (one if published else stayed)  # as published, all but those that were drawn
            assert one <= stayed and len(one) == min(2, len(stayed))
            assert other <= rest and len(other) == min(2, len(rest))
            mixed.add((published, bool(other & stayed)))
    assert (False, True) not in mixed and (name != "toy" or (True, True) in mixed)  # civil ones that nobody went to


def test_an_item_receives_from_itself_also_where_others_are_the_same():
    log = make_log([[*range(1, 8), 8, 9]] * 2)  # seven identical columns, the last two items left out
    likes = similarity_graph(log, k=4).dense()
    assert (likes.diagonal()[1:8] == 0.2).all() and ((likes[1:8] > 0).sum(1) == 5).all()
    assert likes[7].nonzero()[:, 0].tolist() == [1, 2, 3, 4, 7]  # of the others, those with lower numbers


def test_the_dense_matrix_is_on_the_device_of_the_graph():
    assert transition_graph(ODD["toy"]).to("meta").dense().device.type == "meta"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), p=st.sampled_from((0.0, 0.5)))
def test_propagation_is_the_dense_product_with_its_gradient(seed, p):
    log = toy_log(30, 16, seed=seed)
    for graph in (transition_graph(log), similarity_graph(log)):
        graph = replace(graph, weight=graph.weight.double())
        present = torch.rand(len(graph.senders), generator=seeded(seed)) > 0.3
        weights = drop_edges(convolution_weights(graph, present), p, seeded(seed))
        edges, loops = weights.split([len(graph.senders), log.n + 1])
        M = replace(graph, weight=edges).dense() + loops.diag()
        x = torch.randn(log.n + 1, 5, dtype=torch.float64, generator=seeded(seed)).requires_grad_()
        y = torch.randn(log.n + 1, 5, dtype=torch.float64, generator=seeded(seed + 1))
        ours, dense = light_convolution(x, graph, weights), (x + M @ x + M @ M @ x) / 3
        torch.testing.assert_close(ours, dense)
        for a, b in zip(*(torch.autograd.grad((each * y).sum(), x) for each in (ours, dense))):
            torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(lambda z: _Spread.apply(z, graph, edges), (x,))


# ---- logs

def write(folder, train, test=None, head=HEAD):
    for part, rows in (("train", train), ("test", test)):
        if rows is not None: (folder / f"toy.{part}.inter").write_text("\n".join([head, *rows]) + "\n" * bool(rows))


GOOD = (["u\t4 7\t9", "v\t7\t4"], ["u\t4 7 9\t4", "v\t7 4\t8"])


def test_rows_may_stand_in_any_order(tmp_path):
    write(tmp_path, GOOD[0][::-1], GOOD[1])
    log = read_logs(tmp_path)
    assert [log.tokens[np.array(log[user]) - 1].tolist() for user in (0, 1)] == [[4, 7, 9, 4], [7, 4, 8]]
    assert load_log(str(tmp_path)).items.equal(log.items)
    for part in ("train", "test"): (tmp_path / f"toy.{part}.inter").rename(tmp_path / f"a.train.b.{part}.inter")
    assert read_logs(tmp_path).items.equal(log.items)


@pytest.mark.parametrize("train, test, said", [
    ([], GOOD[1], "toy.train.inter: there is no row"),
    (GOOD[0] + ["u\t1\t2"], GOOD[1], "line 4: user u has a row already"),
    (GOOD[0], GOOD[1][:1], "user v is in one of the two files only"),
    (GOOD[0], ["u\t4 7 8\t4", GOOD[1][1]], "toy.test.inter: user u: its items are not those of toy.train.inter"),
    (["u\t4  7\t9"], GOOD[1], r"line 2 is 'u\\t4  7\\t9'; expected user, items and target"),
    (["u\t4 7\t9 9"], GOOD[1], "line 2"), (["u\t4 0\t9"], GOOD[1], "line 2"), (["u\t-4 2\t9"], GOOD[1], "line 2"),
    (["u\t4 1_0\t9"], GOOD[1], "line 2"), (["u\t+4 7\t9"], GOOD[1], "line 2"), (["u\t٤ 7\t9"], GOOD[1], "line 2"),
    (["\t4 7\t9"], GOOD[1], "line 2"), ([f"u\t4 {2**63}\t9"], GOOD[1], "line 2"),
    (["u\t\t9"], GOOD[1], "line 2"), (["u\t4 7 9"], GOOD[1], "line 2"), ([""], GOOD[1], "line 2 is ''")])
def test_files_that_cannot_be_meant_are_refused(train, test, said, tmp_path):
    write(tmp_path, train, test)
    with pytest.raises(ValueError, match=said) as error: read_logs(tmp_path)
    assert "\n" not in str(error.value)


def test_empty_foreign_and_missing_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="0 files end in .train.inter"): read_logs(tmp_path)
    (tmp_path / "toy.train.inter").touch()
    with pytest.raises(ValueError, match="the first line is ''"): read_logs(tmp_path)
    write(tmp_path, *GOOD, head="user\titem")
    with pytest.raises(ValueError, match="first line is 'user"): read_logs(tmp_path)
    write(tmp_path, GOOD[0])
    (tmp_path / "toy.test.inter").unlink()
    with pytest.raises(FileNotFoundError): read_logs(tmp_path)
    monkeypatch.setenv("TEMP_NCE_DATA", "")
    def unplugged(*arguments, **named): raise OSError("no network")
    monkeypatch.setattr(data, "download", unplugged)
    with pytest.raises(FileNotFoundError, match="reddit: no folder dcrec/reddit .*no network"):
        load_log("reddit", tmp_path)
    with pytest.raises(ValueError, match="'movies' is no log; give one of reddit, beauty"): load_log("movies", tmp_path)


def test_movielens_is_taken_from_a_folder_by_gits_sum_or_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMP_NCE_DATA", "")
    folder = tmp_path / "dcrec" / "ml-20m"
    folder.mkdir(parents=True)
    write(folder, *GOOD)
    for part in ("train", "test"): (folder / f"toy.{part}.inter").rename(folder / f"ml-20m.{part}.inter")
    with pytest.raises(ValueError, match="git's sum .* instead of 2169cf8e"): load_log("ml-20m", tmp_path)
    sums = tuple(data.git_sum(folder / f"ml-20m.{part}.inter") for part in ("train", "test"))
    monkeypatch.setitem(data._SUMS, "ml-20m", sums)
    assert len(load_log("ml-20m", tmp_path)) == 2
    class Served:
        def __init__(self, *handlers): pass
        def open(self, request, timeout):
            assert request.full_url.startswith("https://github.com/HKUDS/DCRec/raw/") and timeout == 30
            answer = io.BytesIO((folder / request.full_url.rsplit("/", 1)[1]).read_bytes())
            answer.headers = {"Content-Length": len(answer.getbuffer())}
            return answer
    monkeypatch.setattr(sources, "build_opener", Served)
    assert load_log("ml-20m", tmp_path / "elsewhere").items.equal(load_log("ml-20m", tmp_path).items)
    monkeypatch.setitem(data._SUMS, "ml-20m", (sums[0], "0" * 40))
    with pytest.raises(FileNotFoundError, match="git's sum"): load_log("ml-20m", tmp_path / "third")
    assert not list((tmp_path / "third").rglob("*.inter"))


def test_users_with_too_few_items_and_impossible_draws_are_refused():
    with pytest.raises(ValueError, match="user 1 has 1 items; give at least 3"): make_log([[1, 2, 3], [4]])
    with pytest.raises(ValueError, match="none came"): make_log([])
    with pytest.raises(ValueError, match="users: 9 came; give 1 to 3"): keep_users(make_log([[1, 2, 3]] * 3), 9)
    with pytest.raises(ValueError, match="there is no other"): draw_candidates(make_log([[1, 2, 3], [3, 1, 2]]))
    with pytest.raises(ValueError, match="items: 50 came; give a multiple of 4"): toy_log(20, 50)


@pytest.mark.parametrize("row", ([1, 1.7, 2], [1.0, 2.0, 3.0], ["1", "2", "3"], [True, False, True], [1, 2, 2**63],
                                 [1, 2, 10**30], [1, None, 2]))
def test_items_that_are_no_whole_numbers_are_refused(row):
    with pytest.raises(ValueError, match="sequences: user Bob: .* came; give whole numbers") as error:
        make_log([[1, 2, 3], row], ["Ann", "Bob"])
    assert "\n" not in str(error.value)


def test_items_of_any_integer_type_are_taken():
    rows = [np.array([7, 8, 9], np.uint8), torch.tensor([9, 8, 7], dtype=torch.int32), [2**62, 7, 8]]
    log = make_log(rows)
    assert [*log] == [[1, 2, 3], [3, 2, 1], [4, 1, 2]] and log.tokens.tolist() == [7, 8, 9, 2**62]


@pytest.mark.parametrize("user", (-1, -2, 3, 100))
def test_users_that_there_are_not_are_refused(user):
    log = make_log([[1, 2, 3]] * 3)
    with pytest.raises(IndexError, match=f"user: {user} came; give 0 to 2"): log[user]
    assert len([*log]) == 3


def test_users_of_three_items_train_nothing_and_are_asked(tmp_path):
    log = make_log([*toy_log(30, 12), [1, 2, 3], [40, 41, 42]])  # the last user's items are nobody else's
    rows = training_rows(log)
    assert len(rows) == (log.lengths - 3).sum() and not (rows[:, 0] >= log.starts[-3]).any()
    assert popularity(log)[log.n] == 0 and len(question_rows(log)) == len(log)
    run = train_recommender(log, RecommendRecipe(epochs=1, **QUIET), folder=tmp_path)
    assert all(ranks.isfinite().all() and (ranks >= 1).all() for each in run.ranks.values() for ranks in each.values())
    metrics = rank_metrics(run.ranks["popularity"])
    assert 0 < metrics["hr10_all"] <= 1 and run.ranks["popularity"]["all"][-1] > 10


def test_a_log_without_a_training_row_is_refused_unless_nothing_is_trained(tmp_path):
    log = make_log([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    train = lambda **recipe: train_recommender(log, RecommendRecipe(epochs=1, **QUIET, **recipe), folder=tmp_path)
    with pytest.raises(ValueError, match="log: no user has 4 items; give longer sequences, or held_out=False"): train()
    assert train(temperature="popularity").history == []
    assert len(train(held_out=False).history) == 1


@needs_logs
def test_the_sets_have_the_published_sizes():
    for name, users, items, rows, edges in (("reddit", 14_486, 15_416, 289_020, 367_036),
                                            ("beauty", 56_848, 41_532, 151_786, 218_704),
                                            ("sports", 85_226, 56_974, 229_879, 337_090)):
        log = load_log(name, HOME.parent)
        assert (len(log), log.n, len(training_rows(log, held_out=False))) == (users, items, rows)
        assert all(len({*log[user]}) == len(log[user]) for user in range(len(log)))  # nobody comes back to an item
        assert len(transition_graph(log).senders) + 1 == edges  # the code has one more node, with a diagonal entry
        assert len(training_rows(log)) == rows - users


@pytest.mark.parametrize("call, said", [
    (lambda log: question_rows(log, 0), "back: 0 came"), (lambda log: question_rows(log, 4), "back: 4 came; give less"),
    (lambda log: popularity(log, -5), "back: -5 came"), (lambda log: transition_graph(log, -1), "back: -1 came"),
    (lambda log: similarity_graph(log, back=-1), "back: -1 came"),
    (lambda log: similarity_graph(log, published="mended"), "published: 'mended' came; give True or False"),
    (lambda log: draw_candidates(log, published="mended"), "published: 'mended' came; give True or False"),
    (lambda log: popularity_ranks(keep_users(log, 10), draw_candidates(log)), "candidates: those of 30 users"),
    (lambda log: RecommendTask(RecommendRecipe(**QUIET), keep_users(log, 10), torch.device("cpu"),
                               draw_candidates(log)), "candidates: those of 30 users"),
    (lambda log: ndcg(torch.tensor([0.0, 1.0]), 10), "ranks: 0.0 came; give places from 1"),
    (lambda log: hit_rate(torch.tensor([1.0, np.nan]), 10), "ranks: nan came"),
    (lambda log: RecommendRecipe(drop=0.999999), "drop: 0.999999 came"),
    (lambda log: RecommendRecipe(seed=2**63 - 2), "seed: 9223372036854775806 came"),
    (lambda log: DCRec(5, layers=0), "layers: 0 came"),
    (lambda log: check_parameters(vars(RecommendRecipe()) | {"patience": -1}), "patience: -1 came"),
    (lambda log: training_rows(log, None), "held_out: None came; give True or False"),
    (lambda log: training_rows(log, "False"), "held_out: 'False' came"),
    (lambda log: toy_log(seed=-1), "seed: -1 came"), (lambda log: keep_users(log, 3, seed="a"), "seed: 'a' came"),
    (lambda log: load_log("~nobody-of-this-name/x"), "name: '~nobody-of-this-name/x' is no log"),
    (lambda log: load_log(None), "name: NoneType came; give one of reddit"),
    (lambda log: load_log(""), "name: '' is no log")])
def test_arguments_that_cannot_be_meant_are_refused(call, said):
    with pytest.raises((TypeError, ValueError), match=said): call(toy_log(30, 12))


def test_every_set_has_sums(monkeypatch):
    assert set(LOGS) == {"reddit", "beauty", "sports", "ml-20m", "toy"}
    assert all(len(each) in (40, 64) for pair in data._SUMS.values() for each in pair)


# ---- ranks

def test_places_by_hand_with_ties():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0]])
    for own, place in ((3.0, 1.5), (2.0, 3.5), (1.0, 5.5), (2.5, 2.0), (0.0, 6.0)):
        assert places(scores, torch.tensor([own])).item() == place
    table = torch.tensor([[9.0], [3.0], [1.0], [2.0], [2.0], [2.0]])  # row 0 is padding
    ranks = list_ranks(torch.ones(5, 1), table, torch.arange(1, 6))["all"]
    assert ranks.tolist() == [1, 5, 3, 3, 3]
    assert hit_rate(ranks, 3).tolist() == [1, 0, 1, 1, 1] and ndcg(ranks, 3).tolist() == [1, 0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("wrong", (np.nan, np.inf, -np.inf))
def test_scores_that_are_lost_are_refused(wrong):
    users, table, target = torch.ones(600, 1), torch.arange(4.0)[:, None], torch.ones(600, dtype=torch.int64)
    for lost, at in ((users.clone(), 599), (table.clone(), 2)):
        lost[at] = wrong
        vectors = (lost, table) if len(lost) == 600 else (users, lost)
        with pytest.raises(ValueError, match="users @ table: .* came; give vectors whose products are finite"):
            list_ranks(*vectors, target)


def test_a_network_that_lost_its_weights_is_not_judged():
    task = task_of(toy_log(60, 20))
    with torch.no_grad(): task.model.items.weight.fill_(np.nan)
    with pytest.raises(ValueError, match="users @ table: nan came"): task.evaluate()


def test_metrics_are_those_of_torchmetrics():
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalNormalizedDCG
    log = toy_log(60, 24, seed=5)
    (users, table), candidates = torch.randn(2, 60, 8, generator=seeded()), draw_candidates(log)
    table = table[:log.n + 1]
    metrics = rank_metrics(list_ranks(users, table, log.targets, candidates))
    own = torch.zeros(60, log.n + 1, dtype=torch.bool).scatter(1, log.targets[:, None], True)
    drawn = torch.zeros(own.shape).scatter_add(1, candidates.items, candidates.counted.float()) > 0
    for among, listed in (("all", torch.arange(log.n + 1).expand(60, -1) > 0), ("pop", own | drawn)):
        who = torch.arange(60)[:, None].expand_as(own)[listed]
        for name, theirs in (("hr1", RetrievalHitRate(top_k=1)), ("hr10", RetrievalHitRate(top_k=10)),
                             ("ndcg5", RetrievalNormalizedDCG(top_k=5)), ("ndcg10", RetrievalNormalizedDCG(top_k=10))):
            expected = theirs((users @ table.T)[listed], own[listed], indexes=who).item()
            assert metrics[f"{name}_{among}"] == pytest.approx(expected, abs=1e-6), (name, among)


def test_candidates_that_do_not_count_do_not_move_a_place():
    candidates = Candidates(torch.tensor([[2, 2, 1, 3]]), torch.tensor([[True, False, False, True]]))
    table = torch.tensor([[0.0], [1.0], [5.0], [0.5]])
    assert list_ranks(torch.ones(1, 1), table, torch.tensor([1]), candidates)["pop"].tolist() == [2]


def test_candidates_follow_popularity_and_published_ones_are_dealt_to_others():
    log = toy_log(600, 40)
    ours, theirs = draw_candidates(log, seed=1), draw_candidates(log, seed=1, published=True)
    for user in range(len(log)): assert not set(ours.items[user].tolist()) & set(log[user])
    assert any(log.targets[user] in theirs.items[user] for user in range(len(log)))  # checked for somebody else
    assert not (theirs.counted & (theirs.items == log.targets[:, None])).any()
    counts = Counter(log.targets.tolist()) + Counter(log.items[log.starts[1:] - 2].tolist())
    drawn = Counter(theirs.items.flatten().tolist())
    share = {item: drawn[item] / theirs.items.numel() - count / (2 * len(log)) for item, count in counts.items()}
    assert max(map(abs, share.values())) < 0.02
    assert not torch.equal(ours.items, draw_candidates(log, seed=2).items)


def test_runs_on_other_users_are_not_compared(tmp_path):
    for name, log in (("one", toy_log(30, 12)), ("other", toy_log(30, 12, seed=1))):
        for seed in (0, 1):
            train_recommender(log, RecommendRecipe(epochs=1, seed=seed, **QUIET), folder=tmp_path / f"{name}-{seed}")
    one = [tmp_path / f"one-{seed}" for seed in (0, 1)]
    assert user_differences(one, one)["hr"].mean == 0 and user_differences(one, one[:1])["ndcg"].users == 30
    with pytest.raises(ValueError, match="different users"): user_differences(one, [tmp_path / "other-0"])


# ---- training

@pytest.mark.parametrize("temperature", ("free", "learnable", "none"))
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(temperature, tmp_path, monkeypatch):
    log = toy_log(60, 20)
    recipe = RecommendRecipe(**{**QUIET, "drop": 0.3, "drop_attention": 0.3, "drop_edge": 0.3, "epochs": 3},
                             temperature=temperature)
    whole = train_recommender(log, recipe, folder=tmp_path / "whole")
    forward, calls = RecommendTask.forward, []
    def power_cut(task, batch):
        calls.append(1)
        if len(calls) == 9: raise KeyboardInterrupt
        return forward(task, batch)
    monkeypatch.setattr(RecommendTask, "forward", power_cut)
    with pytest.raises(KeyboardInterrupt): train_recommender(log, recipe, folder=tmp_path / "cut", checkpoint_steps=3)
    monkeypatch.undo()
    again = train_recommender(log, recipe, folder=tmp_path / "cut", resume=True, checkpoint_steps=3)
    timeless = lambda run: [{name: value for name, value in record.items() if name != "seconds"}
                            for record in run.history]
    assert timeless(whole) == timeless(again) and whole.metrics == again.metrics
    for name, weight in whole.task.model.state_dict().items():
        assert torch.equal(weight, again.task.model.state_dict()[name])
    for epoch in ("best", "last"): assert torch.equal(whole.ranks[epoch]["all"], again.ranks[epoch]["all"])


def test_settings_share_candidates_and_start_and_differ_in_the_term(tmp_path):
    log = toy_log(60, 20)
    one, other = (task_of(log, temperature=temperature) for temperature in ("0.1", "none"))
    for name, weight in one.model.state_dict().items(): assert torch.equal(weight, other.model.state_dict()[name])
    batch = torch.arange(64)
    a, b = (task.objective(task.forward(batch), batch) for task in (one, other))
    assert torch.equal(a["next_item"], b["next_item"]) and torch.equal(a["shape"], b["shape"]) and "contrast" not in b
    torch.testing.assert_close(a["loss"] - a["contrast"], b["loss"])


def test_epochs_are_picked_by_the_held_out_item_and_the_official_one_by_the_test(tmp_path):
    run = train_recommender(toy_log(80, 20), RecommendRecipe(epochs=4, lr=0.01, **QUIET), folder=tmp_path)
    best = max(run.history, key=lambda record: record["valid_hr10_all"])
    official = max(run.history, key=lambda record: record["hr1_pop"])
    assert run.metrics["epoch_best"] == best["epoch"] and run.metrics["hr10_all_best"] == best["hr10_all"]
    assert run.metrics["epoch_official"] == official["epoch"]
    assert run.metrics["hr10_pop_official"] == official["hr10_pop"]
    assert run.metrics["hr10_all_last"] == run.history[-1]["hr10_all"] == hit_rate(run.ranks["last"]["all"], 10).mean()
    as_published = train_recommender(toy_log(80, 20), RecommendRecipe(
        epochs=3, held_out=False, similarity="published", neighbours="published", negatives="published", **QUIET),
        folder=tmp_path / "published")
    assert as_published.metrics["epoch_best"] == as_published.metrics["epoch_official"]
    assert not any(name.startswith("valid") for name in as_published.history[0])


def test_popularity_is_measured_and_not_trained(tmp_path):
    log = toy_log(60, 20)
    run = train_recommender(log, RecommendRecipe(temperature="popularity", **QUIET), folder=tmp_path)
    expected = rank_metrics(popularity_ranks(log, draw_candidates(log)))
    assert run.history == [] and run.metrics["hr10_all_best"] == expected["hr10_all"] == run.metrics["hr10_all_last"]


def test_batches_hold_every_row_once_an_epoch_and_evaluation_leaves_no_trace():
    task = task_of(toy_log(60, 20), drop_edge=0.5, neighbours="published")
    assert torch.cat(list(task.batches(0))).sort().values.tolist() == list(range(len(task.rows)))
    before = {name: generator.get_state() for name, generator in task.generators.items()}
    one, other = task.evaluate(), task.evaluate()
    assert one == other
    for name, generator in task.generators.items(): assert torch.equal(generator.get_state(), before[name])


@pytest.mark.parametrize("wrong, said", [
    (dict(temperature="macl"), "'macl' is unknown"), (dict(temperature=0), "0"), (dict(drop=1), "drop: 1.0"),
    (dict(heads=3), "heads: 3"), (dict(epochs=0), "epochs: 0"), (dict(similar=2.5), "similar: 2.5"),
    (dict(negatives="all"), "negatives: 'all'"), (dict(held_out=1), "held_out: 1"), (dict(lr=-1), "lr: -1")])
def test_wrong_recipes_are_refused(wrong, said):
    with pytest.raises((TypeError, ValueError), match=said): RecommendRecipe(**wrong)


@pytest.mark.parametrize("call, said", [
    (lambda: contrastive_term(InfoNCELoss("0.8"), *torch.ones(3, 4, 2), torch.ones(4)), "loss.reduction: 'mean'"),
    (lambda: contrastive_term(InfoNCELoss("0.8", reduction="none"), *torch.ones(3, 4, 2), torch.ones(1)), "weight: "),
    (lambda: user_differences("runs/a", ["runs/b"]), "ours: 'runs/a' came"),
    (lambda: user_differences(["runs/a"], []), "theirs: "),
    (lambda: paired_gap(torch.tensor([1.0, torch.nan]), torch.ones(2)), "NaN or infinity"),
    (lambda: list_ranks(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])), "target: "),
    (lambda: list_ranks(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([4])), "target: "),
    (lambda: by_popularity(torch.ones(9), toy_log(60, 24)), "values: shape"),
    (lambda: dropout(torch.ones(3), 1.0, seeded()), "p: 1.0 came"),
    (lambda: dropout(torch.ones(3), -1, seeded()), "p: -1 came"),
    (lambda: drop_edges(torch.ones(3), 1.5, None), "p: 1.5 came"),
    (lambda: Layer(10, 3, 16, 0.0, 0.0), "heads: 3 came"),
    (lambda: list_ranks(torch.ones(1, 3), torch.ones(5, 3), torch.tensor([4]),
                        Candidates(torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool))), "items 0 to 1 came"),
    (lambda: conformity(*torch.ones(4, 3, 2), torch.ones(1), 0.4), "length: shape .1,. came; give .3,."),
    (lambda: shape_term(torch.ones(3), torch.ones(1)), "wanted: shape .1,. came; give .3,."),
    (lambda: make_log([[[1, 2], [3, 4]]]), "user 0 has rows of shape"),
    (lambda: make_log([[1, [2, 3], 4]]), "user 0 has .1, .2, 3., 4.; give a flat sequence"),
    (lambda: make_log([[1, 2, 3], [1, 2, 3]], ["a"]), "names: 1 came for 2 users")])
def test_what_would_give_a_wrong_number_is_refused(call, said):
    with pytest.raises(ValueError, match=said): call()


def test_parameters_of_a_notebook_make_a_recipe():
    recipe = RecommendRecipe(temperature="free", seed=3)
    assert check_parameters(vars(recipe) | {"dataset": "toy", "users": 0}) == recipe


@pytest.mark.slow
def test_smoke_run_on_a_log_made_here(tmp_path):
    environment = os.environ | {"TEMP_NCE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from temp_nce.lab.cli import main; main()", "run", "recommend", "--scale",
               "smoke", "--device", "cpu", "--set", "temperature=free"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    row, = (json.loads(line) for line in (tmp_path / "data/results/recommend.jsonl").read_text().splitlines())
    assert row["parameters"]["dataset"] == "toy" and 0.3 < row["metrics"]["hr10_all_best"] <= 1
    assert (tmp_path / "data/runs/recommend" / row["id"] / "ranks-best.npz").exists()
