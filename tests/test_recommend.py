"""Recommendation: logs, graphs, the model's terms against the published code's formulas, ranks, training, speed."""
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
from hypothesis import given, settings
from hypothesis import strategies as st

from temp_nce.engine import fit
from temp_nce.losses import InfoNCELoss
from temp_nce.recommend import (LOGS, Candidates, RecommendRecipe, RecommendTask, check_parameters, draw_candidates,
                                hit_rate, keep_users, list_ranks, load_log, make_log, ndcg, popularity, popularity_ranks,
                                rank_metrics, read_logs, similarity_graph, toy_log, train_recommender, transition_graph)
from temp_nce.recommend import data
from temp_nce.recommend.data import question_rows, training_rows
from temp_nce.recommend.links import _Spread, convolution_weights, drop_edges, light_convolution
from temp_nce.recommend.ranks import places, user_differences
from temp_nce.recommend.terms import (average, conformity, contrastive_term, draw_neighbours, shape_term, steps_of,
                                      without_users)
from temp_nce.sources import places as data_places
from temp_nce.temperature import make_temperature

REPOSITORY = Path(__file__).resolve().parents[1]
HOME = next((place / "dcrec" for place in data_places(REPOSITORY / "data") if (place / "dcrec/reddit").is_dir()), None)
needs_logs = pytest.mark.skipif(HOME is None, reason="Reddit is not in data/dcrec, nor in the folder that TEMP_NCE_DATA "
                                "names")
HEAD = "session_id:token\titem_id_list:token_seq\titem_id:token"
QUIET = dict(hidden=8, inner=16, drop=0.0, drop_attention=0.0, drop_edge=0.0, batch_size=64)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def task_of(log, seed=0, **recipe):
    return RecommendTask(RecommendRecipe(**{**QUIET, "seed": seed, **recipe}), log, torch.device("cpu"),
                         draw_candidates(log, k=20))


def histories(log, back=2): return [log[user][:-back] for user in range(len(log))]


# ---- every term against the published formulas

@pytest.mark.parametrize("tau", ("0.8", "0.1", "free", "dystress"))
@pytest.mark.parametrize("neighbours", ("mended", "published"))
def test_a_step_is_the_published_one_to_the_tenth_digit(tau, neighbours):
    log = toy_log(60, 24, seed=5)
    task = task_of(log, temperature=tau, neighbours=neighbours)
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
    from temp_nce.recommend import training
    seen, original = {}, training.draw_neighbours
    def spy(*arguments):
        seen["drawn"] = original(*arguments)
        return seen["drawn"]
    training.draw_neighbours = spy
    try: out = task.forward(batch)
    finally: training.draw_neighbours = original
    return [[set(row) - {0} for row in part.tolist()] for part in seen["drawn"]], out["wanted"].double()


@needs_logs
@pytest.mark.slow
def test_a_step_is_at_least_twice_as_fast_as_the_plain_one_and_its_losses_are_equal():
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
    for name in ("next_item", "contrast", "shape"): torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=0)
    task.recipe, task.model.drop, task.model.encoder.drop = loud, 0.5, 0.5
    for layer in task.model.encoder.layers: layer.drop = layer.drop_attention = 0.5

    def fast(batch): return task.objective(task.forward(batch), batch)["loss"]
    def slow(batch):
        terms = plain.calculate_loss(task.model, graphs, edges, plain.padded(log, task.rows[batch], 50), loud,
                                     make_temperature("0.8"))
        return terms["next_item"] + terms["contrast"] + terms["shape"]
    spent = {fast: [], slow: []}
    for batch in batches[1:8]:
        for way, seconds in spent.items():
            begun = time.process_time()
            task.optimizer.zero_grad(set_to_none=True)
            way(batch).backward()
            task.optimizer.step()
            seconds.append(time.process_time() - begun)
    medians = {way.__name__: sorted(seconds)[len(seconds) // 2] for way, seconds in spent.items()}
    print({name: round(seconds, 3) for name, seconds in medians.items()}, round(medians["slow"] / medians["fast"], 2))
    assert medians["slow"] > 2 * medians["fast"]
