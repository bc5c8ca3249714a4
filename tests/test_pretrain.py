"Pre-training: a run that is killed goes on to the same last digit, and nothing half-written is taken for whole."
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch._dynamo.utils import counters

from temp_nce.engine import fingerprint, lr_factor
from temp_nce.engine.checkpoint import content_digest
from temp_nce.files import process_mark, run_hash
from temp_nce.images.data import load_images
from temp_nce.metrics import alignment, knn_accuracy, uniformity
from temp_nce.images.models import load_encoder
from temp_nce.images.simclr import ImageTask, Recipe, encode, measure, pretrain, view_pairs, wrong_partners

RECIPE = Recipe(encoder="conv3", views="digits", epochs=4, batch_size=50, lr=0.2, knn_k=5)


@pytest.fixture(scope="module")
def images():
    torch.set_num_threads(1)
    return load_images("digits").subset(150, seed=0), load_images("digits", split="test").subset(60, seed=0)


SCRIPT = """
import json, sys, time, torch
torch.set_num_threads(1)
from temp_nce.images.data import load_images
from temp_nce.images.simclr import ImageTask, Recipe, pretrain
if sys.argv[3] == "slow":  # leave time for the kill
    begin = ImageTask.begin_epoch
    def slowly(task, epoch, epochs): time.sleep(30 if epoch == 2 else 0); begin(task, epoch, epochs)
    ImageTask.begin_epoch = slowly
train, test = load_images("digits").subset(150, seed=0), load_images("digits", split="test").subset(60, seed=0)
recipe = Recipe(temperature=sys.argv[2], encoder="conv3", views="digits", epochs=4, batch_size=50, lr=0.2, knn_k=5)
result = pretrain(train, test, recipe, folder=sys.argv[1], resume=True, device="cpu")
print(json.dumps([result.metrics, [record["loss"] for record in result.history]]))
"""


@pytest.mark.parametrize("temperature", ("free", "isogclr"))
def test_kill_9_and_resume_gives_the_same_bits(temperature, tmp_path):
    run = lambda folder, speed: subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / folder), temperature,
                                                  speed], stdout=subprocess.PIPE, text=True)
    killed = run("cut", "slow")
    deadline = time.time() + 120
    history = tmp_path / "cut" / "history.jsonl"
    while not (history.exists() and len(history.read_text().splitlines()) == 2
               and (tmp_path / "cut" / "checkpoint.pt").exists()):
        assert killed.poll() is None and time.time() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    # what a kill in the middle of a write leaves
    left = tmp_path / "cut" / f".checkpoint.pt.{process_mark(killed.pid)}-1.tmp"
    left.write_bytes(b"half a checkpoint")
    resumed, whole = (run(folder, "fast").communicate()[0] for folder in ("cut", "whole"))
    assert json.loads(resumed) == json.loads(whole)
    a, b = (torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True) for folder in ("cut", "whole"))
    assert all(torch.equal(a["parts"][part][name], b["parts"][part][name]) for part in ("encoder", "head", "loss")
               for name in a["parts"][part])
    assert not left.exists()


def test_same_seed_same_run_and_other_seed_other_run(images):
    first, second, other = (pretrain(*images, replace(RECIPE, epochs=1, seed=seed)) for seed in (0, 0, 1))
    assert first.metrics == second.metrics and first.history[0]["loss"] != other.history[0]["loss"]


def test_global_random_state_neither_matters_nor_changes(images):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = pretrain(*images, replace(RECIPE, epochs=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    assert pretrain(*images, replace(RECIPE, epochs=1)).metrics == first.metrics


def test_checkpoint_of_another_recipe_or_images_is_refused(images, tmp_path):
    train, test = images
    pretrain(train, test, replace(RECIPE, epochs=1), folder=tmp_path)
    for recipe, data in ((replace(RECIPE, epochs=1, lr=0.1), train),
                         (replace(RECIPE, epochs=1), train.subset(100, seed=1))):
        with pytest.raises(ValueError, match="checkpoint.*another"):
            pretrain(data, test, recipe, folder=tmp_path, resume=True)


def test_damaged_checkpoint_is_named(images, tmp_path):
    pretrain(*images, replace(RECIPE, epochs=1), folder=tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
        pretrain(*images, replace(RECIPE, epochs=1), folder=tmp_path, resume=True)


def test_files_of_a_run(images, tmp_path):
    result = pretrain(*images, RECIPE, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "encoder.pt", "encoder_best.pt",
                                                                "history.jsonl"]
    assert [json.loads(line)["epoch"] for line in (tmp_path / "history.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    encoder, test = load_encoder(tmp_path / "encoder.pt"), images[1]
    torch.testing.assert_close(encode(encoder, test, RECIPE), result.features)
    accuracies = [record["knn_top1"] for record in result.history]
    assert result.metrics["knn_top1_best"] == max(accuracies) and result.metrics["knn_top1_last"] == accuracies[-1]
    assert result.metrics["best_epoch"] == accuracies.index(max(accuracies)) + 1


def test_finished_run_resumed_is_evaluated_again_without_training(images, tmp_path):
    first = pretrain(*images, RECIPE, folder=tmp_path)
    assert pretrain(*images, RECIPE, folder=tmp_path, resume=True).metrics == first.metrics


def test_knn_every_measures_the_last_epoch_too(images):
    history = pretrain(*images, replace(RECIPE, epochs=3, knn_every=2)).history
    assert ["knn_top1" in record for record in history] == [False, True, True]


@pytest.fixture(scope="module")
def many(images):
    "The same training images, and all 445 test images: with 60, one of them moves an accuracy by 1.7 points."
    return images[0], load_images("digits", split="test")


@pytest.fixture(scope="module")
def published(many):
    "The run that the fast variants are held to: fp32, eager."
    return pretrain(*many, RECIPE)


def same_course(result, published, loss, accuracy):
    "First and last loss within a relative bound, accuracies within a share of the test images."
    for epoch in (0, -1):
        assert result.history[epoch]["loss"] == pytest.approx(published.history[epoch]["loss"], rel=loss)
    for name in ("knn_top1_last", "linear_top1"):
        assert result.metrics[name] == pytest.approx(published.metrics[name], abs=accuracy)


def test_bf16_agrees_with_fp32(many, published):
    half = pretrain(*many, replace(RECIPE, precision="bf16", channels_last=True))
    same_course(half, published, loss=0.02, accuracy=0.05)
    assert half.features.dtype == torch.float32


def test_the_same_weights_in_bf16_give_nearly_the_same_features(images, published):
    full, half = (encode(published.encoder, images[1], replace(RECIPE, precision=precision))
                  for precision in ("fp32", "bf16"))
    assert torch.nn.functional.cosine_similarity(full, half).min() > 0.999
    assert not torch.equal(full, half)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))),
                    reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_agrees_with_eager(many, published):
    counters["stats"].clear()
    compiled = pretrain(*many, replace(RECIPE, compile=True))
    assert counters["stats"]["unique_graphs"] >= 1  # torch may skip a network silently
    same_course(compiled, published, loss=0.005, accuracy=0.05)


def test_monitored_knn_is_that_of_fresh_features(many, published, tmp_path):
    train, test = many
    def fresh(encoder):
        return knn_accuracy(encode(encoder, train, RECIPE), train.labels, encode(encoder, test, RECIPE), test.labels,
                            k=RECIPE.knn_k, t=RECIPE.knn_t)
    again = pretrain(train, test, RECIPE, folder=tmp_path)
    assert fresh(published.encoder) == published.metrics["knn_top1_last"] == again.metrics["knn_top1_last"]
    assert fresh(load_encoder(tmp_path / "encoder_best.pt")) == again.metrics["knn_top1_best"]


def test_geometry_is_that_of_the_test_images(images):
    train, test = images
    encoder = ImageTask(train, test, RECIPE, torch.device("cpu")).modules["encoder"]
    metrics, queries = measure(encoder, train, test, RECIPE)
    assert torch.equal(queries, encode(encoder, test, RECIPE)) and metrics["uniformity"] == uniformity(queries)
    assert metrics["alignment"] == alignment(*view_pairs(encoder, test, RECIPE))


def test_learned_temperature_learns_and_is_kept(images, tmp_path):
    pretrain(*images, replace(RECIPE, temperature="learnable"), folder=tmp_path)
    scale = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["loss"]["temperature.log_scale"]
    assert scale.item() != pytest.approx(math.log(1 / 0.07))


def test_recipe_reaches_the_optimiser(images):
    adam = pretrain(*images, replace(RECIPE, optimizer="adam", lr=1e-3, lr_batch=0, epochs=2, warmup_epochs=1))
    assert [record["lr"] for record in adam.history] == pytest.approx([1e-3 * lr_factor(e, 2, 1) for e in range(2)])
    assert adam.history[0]["loss"] < math.log(99)


def test_joint_views_differ_only_through_batch_normalisation(images):
    joint, apart = (pretrain(*images, replace(RECIPE, epochs=1, joint_views=joint)).history[0]["loss"]
                    for joint in (True, False))
    assert joint != apart and joint == pytest.approx(apart, rel=0.1)


@pytest.mark.parametrize("wrong,words", (
    (dict(epochs=0), "epochs"), (dict(batch_size=1), "batch_size"), (dict(lr=-1.0), "lr"), (dict(lr="0.1"), "lr"),
    (dict(precision="fp8"), "precision"),
    (dict(temperature="hot"), "temperature"), (dict(views="none"), "views"), (dict(optimizer="lion"), "optimizer"),
    (dict(momentum=math.nan), "momentum"),
    (dict(joint_views="yes"), "joint_views"), (dict(encoder="resnet20"), "encoder.*resnet18"),
    (dict(stem="none"), "stem"), (dict(head="big"), "head"),
    (dict(histogram_every=-1), "histogram_every"), (dict(wrong_partner=1.5), "wrong_partner: 1.5"),
    (dict(wrong_partner="half"), "wrong_partner"), (dict(encoder="timm:nosuch"), "encoder.*nosuch"),
    (dict(encoder="timm:convnext_atto", view_size=18), "encoder.*18 × 18"),
    (dict(knn_t=0.0), "knn_t"), (dict(epochs=5, warmup_epochs=5), "warmup_epochs: 5")))
def test_bad_recipes_are_named(wrong, words):
    with pytest.raises((ValueError, TypeError), match=words): Recipe(**wrong)


def test_a_certainty_needs_a_head(images):
    with pytest.raises(ValueError, match="head: none"):
        pretrain(*images, replace(RECIPE, temperature="uncertainty", head="none"))


def test_a_checkpoint_of_another_kind_of_device_is_named(images, tmp_path):
    pretrain(*images, RECIPE, folder=tmp_path)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    content["random"]["views"] = torch.zeros(16, dtype=torch.uint8)  # the size of a CUDA generator's state
    del content["digest"]
    torch.save(content | {"digest": content_digest(content)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="another kind of device than cpu"):
        pretrain(*images, RECIPE, folder=tmp_path, resume=True)


def test_batch_larger_than_the_data(images):
    with pytest.raises(ValueError, match="batch_size: 500.*150"): pretrain(*images, replace(RECIPE, batch_size=500))


def test_metrics_are_those_of_the_encoder(images):
    train, test = images
    result = pretrain(train, test, replace(RECIPE, epochs=1))
    metrics, features = measure(result.encoder, train, test, result.recipe)
    assert torch.equal(features, result.features) and metrics["linear_top1"] == result.metrics["linear_top1"]


def test_streamed_images_give_the_same_run(images, capsys, monkeypatch):
    train, test = images
    recipe = Recipe(encoder="conv3", views="digits", epochs=2, batch_size=64, knn_k=5)
    before, loaders = torch.get_rng_state(), []
    monkeypatch.setattr("temp_nce.images.simclr.DataLoader", lambda *args, **options: loaders.append(options)
                        or torch.utils.data.DataLoader(*args, **options))
    held, streamed = (pretrain(train, test, recipe, stream=stream, workers=1, device="cpu") for stream in (False, True))
    assert ("are streamed" in capsys.readouterr().out and len(loaders) >= 2 + 2 * 2
            and all(options["num_workers"] == 1 for options in loaders))
    assert held.metrics == streamed.metrics and torch.equal(held.features, streamed.features)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stream", (False, True))
def test_pretraining_on_a_gpu(images, stream):
    train, test = images
    result = pretrain(train, test, RECIPE, device="cuda", stream=stream, workers=1)
    assert 0 <= result.metrics["knn_top1_last"] <= 1 and result.features.is_cuda


def test_checkpoints_every_zero_epochs_are_refused(images):
    with pytest.raises(ValueError, match="checkpoint_every: 0"): pretrain(*images, RECIPE, checkpoint_every=0)


@pytest.mark.parametrize("name", ("raw", "untrained"))
def test_baselines_are_measured_and_not_trained(images, name, tmp_path):
    result = pretrain(*images, replace(RECIPE, temperature=name), folder=tmp_path)
    assert result.history == [] and "loss_last" not in result.metrics and result.metrics["best_epoch"] == 0
    assert set(result.metrics) >= {"knn_top1_last", "knn_top1_best", "linear_top1", "uniformity", "tolerance",
                                   "alignment"}
    assert result.features.shape[1] == (3 * 32 * 32 if name == "raw" else 256)


def test_the_untrained_encoder_is_the_one_that_training_starts_from(images):
    untrained, still = (pretrain(*images, replace(RECIPE, epochs=1, temperature=t, lr=0.0)).encoder
                        for t in ("untrained", "free"))
    for one, two in zip(untrained.parameters(), still.parameters(), strict=True): assert torch.equal(one, two)


def bits(result):
    "What must not differ between two runs that are the same."
    return (result.metrics, [(record["loss"], record["positive_cosine"]) for record in result.history],
            [value for value in result.encoder.state_dict().values()])


@pytest.mark.parametrize("changes", (
    dict(temperature="free"), dict(temperature="isogclr"),
    dict(temperature="dystress(stabilise=True)", wrong_partner=0.3),
    dict(precision="bf16", channels_last=True, joint_views=True)), ids=str)
def test_histograms_change_no_bit(images, changes):
    recipe = replace(RECIPE, epochs=3, **changes)
    plain, watched = (pretrain(*images, replace(recipe, histogram_every=every)) for every in (0, 2))
    for one, two in zip(bits(plain), bits(watched)): assert str(one) == str(two)
    assert all(torch.equal(a, b) for a, b in zip(bits(plain)[2], bits(watched)[2], strict=True))
    assert ["pairs" in record for record in watched.history] == [False, True, True]
    assert not any("pairs" in record for record in plain.history)
    last = watched.history[-1]
    assert sum(last["pairs"]) == 100 * 98 and len(json.dumps(last)) < 1000
    assert ("push" in last) is (recipe.temperature != "isogclr")


def test_new_fields_at_their_neutral_values_leave_old_checkpoints_alone(images):
    old = {name: value for name, value in asdict(RECIPE).items() if name not in ("histogram_every", "wrong_partner")}
    assert run_hash(old) == run_hash(asdict(RECIPE), Recipe.NEUTRAL)
    assert set(ImageTask(*images, RECIPE, torch.device("cpu")).generators) == {"order", "views"}
    assert fingerprint(RECIPE) != fingerprint(replace(RECIPE, wrong_partner=0.1))


def test_wrong_partners_move_second_views_and_nothing_else(images):
    one, other = (ImageTask(*images, replace(RECIPE, wrong_partner=rate), torch.device("cpu")) for rate in (0.0, 0.4))
    for task in (one, other): task.network = task.modules["encoder"] = torch.nn.Flatten()
    for task in (one, other): task.modules["head"] = torch.nn.Identity()
    for _ in range(2):  # the streams of order and views are those of a run with right partners
        pairs = [task.forward(batch) for task in (one, other) for batch in [next(iter(task.batches(0)))]]
        (first, second), (same, swapped) = pairs
        moved = (second != swapped).any(1)
        assert torch.equal(first, same) and moved.sum() == 20
        assert sorted(map(str, second[moved].tolist())) == sorted(map(str, swapped[moved].tolist()))


@pytest.mark.parametrize("rate, number", ((0.0, 0), (0.01, 0), (0.02, 0), (0.04, 2), (0.5, 25), (1.0, 50)))
def test_the_share_of_wrong_partners(rate, number):
    for seed in range(5):
        partners = wrong_partners(50, rate, torch.Generator().manual_seed(seed))
        assert (partners != torch.arange(50)).sum() == number and partners.sort().values.equal(torch.arange(50))


def test_a_run_with_wrong_partners_goes_on_bit_for_bit(images, tmp_path, monkeypatch):
    recipe, begin = replace(RECIPE, wrong_partner=0.5, histogram_every=2), ImageTask.begin_epoch
    whole = pretrain(*images, recipe)
    def cut(task, epoch, epochs):
        if epoch == 3: raise KeyboardInterrupt
        begin(task, epoch, epochs)
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "begin_epoch", cut)
        with pytest.raises(KeyboardInterrupt): pretrain(*images, recipe, folder=tmp_path)
    resumed = pretrain(*images, recipe, folder=tmp_path, resume=True)
    assert str(bits(resumed)) == str(bits(whole)) and resumed.history[1]["push"] == whole.history[1]["push"]
    assert whole.history[0]["loss"] != pretrain(*images, replace(RECIPE, epochs=1)).history[0]["loss"]


def test_a_network_of_timm_is_trained_and_kept(images, tmp_path):
    pytest.importorskip("timm")
    name = "timm:vit_tiny_patch16_224(patch_size=8, embed_dim=24, depth=1, num_heads=2)"
    recipe = replace(RECIPE, encoder=name, epochs=2, optimizer="adam", lr=1e-3)
    result, again = (pretrain(*images, recipe, folder=tmp_path / place) for place in "ab")
    assert str(bits(result)) == str(bits(again)) and result.features.shape == (60, 24)
    torch.testing.assert_close(encode(load_encoder(tmp_path / "a" / "encoder.pt"), images[1], recipe), result.features)
