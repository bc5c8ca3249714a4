"""The first steps of every domain's training. Each field of a recipe has to move them: one that does not is read
nowhere. And with a seed of 3 they are what they were when the recorded runs were made, so that a seed that is not
used, a view that comes twice or a wrong mask shows."""
from dataclasses import replace
from itertools import chain, islice

import pytest
import torch

CPU = torch.device("cpu")


def first_steps(task, count=2):
    "The losses of so many steps, and the size of the encoder's weights after them."
    losses = []
    task.begin_epoch(0, 4)
    for batch in islice(chain.from_iterable(map(task.batches, range(count))), count):
        loss = task.objective(task.forward(batch), batch)["loss"]
        task.optimizer.zero_grad()
        loss.backward()
        task.optimizer.step()
        losses.append(loss.item())
    encoder = task.modules.get("encoder", task.modules.get("model"))
    return [*losses, sum(p.abs().sum().item() for p in encoder.parameters())]


def images(changes):
    from temp_nce.images import load_images
    from temp_nce.images.simclr import ImageTask, Recipe
    train, test = load_images("digits").subset(150, seed=0), load_images("digits", split="test").subset(60, seed=0)
    base = Recipe(encoder="conv3", views="digits", epochs=4, batch_size=50, lr=0.2, knn_k=5, momentum=0.9, seed=3)
    return first_steps(ImageTask(train, test, replace(base, **changes), CPU))


def graphs(changes):
    pytest.importorskip("torch_geometric", reason="torch_geometric is the extra `graph`")
    from temp_nce.graphs import GraphRecipe, GraphTask, block_graph
    return first_steps(GraphTask(replace(GraphRecipe(hidden=8, projection=8, seed=3), **changes), block_graph(), CPU))


def anomaly(changes):
    pytest.importorskip("timm", reason="timm is in the extra `anomaly`")
    from temp_nce.anomaly import AnomalyRecipe, AnomalyTask, normal_images
    from temp_nce.images import load_images
    train, test = normal_images(load_images("digits"), "3", 104), load_images("digits", split="test").subset(40)
    base = AnomalyRecipe(normal="3", views="digits", size=16, frozen="", lr=0.05, batch_size=32, momentum=0.9, seed=3)
    return first_steps(AnomalyTask(train, test, replace(base, **changes), CPU))


def text(changes):
    pytest.importorskip("transformers", reason="transformers is the extra `text`")
    from temp_nce.text import TextRecipe, debias, load_entailments, load_swaps, twin_pairs
    pairs = twin_pairs(load_entailments("toy"), load_swaps("few"))[:48]
    base = TextRecipe(encoder="tiny", epochs=1, batch_size=16, lr=2e-3, seed=3)
    trained = debias(pairs, replace(base, **changes), device="cpu")
    assert not trained.encoder.training
    return [trained.history[-1]["loss"], sum(p.abs().sum().item() for p in trained.encoder.parameters())]


def recommend(changes):
    from temp_nce.recommend import RecommendRecipe, RecommendTask, draw_candidates, toy_log
    log = toy_log(200, 24, seed=5)
    recipe = replace(RecommendRecipe(hidden=8, inner=16, batch_size=64, max_length=6, contrast=1.0, seed=3), **changes)
    return first_steps(RecommendTask(recipe, log, CPU, draw_candidates(log)))


DOMAINS = {  # how it steps, what it gave when the recorded runs were made, and other values of its fields
    images: ([4.44636, 4.52964, 4726.17], dict(
        temperature="0.1", encoder="conv6", views="simclr-cifar", head="none", projection=16, batch_size=30, lr=0.1,
        warmup_epochs=2, momentum=0.5, weight_decay=0.1, optimizer="adam", joint_views=True, wrong_partner=0.5,
        seed=4)),
    graphs: ([5.70029, 5.69921, 90.7262], dict(
        temperature="0.1", hidden=16, inner=5, layers=3, activation="prelu", projection=16, drop_edge_0=0.6,
        drop_edge_1=0.6, drop_feature_0=0.6, drop_feature_1=0.6, lr=0.1, weight_decay=0.1, seed=4)),
    anomaly: ([4.57983, 4.12747, 899.355], dict(
        temperature="free", size=12, frozen="stage1", views="simclr-cifar", angular=True, lr=0.1,
        momentum=0.5, weight_decay=0.1, batch_size=16, seed=4)),
    text: ([4.70252, 875.368], dict(
        temperature="free", align="no twins", align_weight=0.5, mlm_weight=0.5, mlm_probability=0.5, pooling="mean",
        tied=True, max_length=6, batch_size=8, lr=1e-3, clip=0.01, precision="bf16", seed=4)),
    recommend: ([6.13829, 6.05762, 69.9089], dict(
        temperature="free", hidden=16, inner=8, layers=1, heads=1, max_length=3, drop=0.1, drop_attention=0.1,
        drop_edge=0.1, similar=1, weight_mean=0.2, contrast=0.1, shape=0.5, similarity="published",
        neighbours="published", held_out=False, batch_size=32, lr=0.01, seed=4))}


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.__name__)
def test_every_field_of_a_recipe_moves_the_first_steps(domain):
    recorded, fields = DOMAINS[domain]
    base = domain({})
    assert base == domain({}) and base == pytest.approx(recorded, rel=5e-4)
    assert [name for name, value in fields.items() if domain({name: value}) == base] == []
