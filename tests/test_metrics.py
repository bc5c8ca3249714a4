"""temp_nce.metrics against slow references, other people's code and exact values."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from temp_nce import metrics
from temp_nce.metrics import alignment, class_tolerance, knn_accuracy, linear_probe, tolerance, uniformity

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
seeds = st.integers(0, 2**31 - 1)


def cloud(n=60, d=8, classes=4, seed=0, noise=0.7, dtype=torch.float32):
    "`n` points around one random direction per class, and their labels; every class occurs."
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    labels = torch.arange(n)[torch.randperm(n, generator=generator)] % classes
    return (centres[labels] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype), labels


def rotation(d, seed):
    "A random orthogonal matrix in float64."
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def slow_knn(bank, bank_labels, queries, query_labels, k, t):
    "The vote written out, one query and one neighbour at a time."
    unit = lambda row: [v / math.hypot(*row) for v in row]
    bank, correct = [unit(row) for row in bank.tolist()], 0
    for query, label in zip(queries.tolist(), query_labels.tolist()):
        query = unit(query)
        nearest = sorted(((sum(a * b for a, b in zip(query, row)), y) for row, y in zip(bank, bank_labels.tolist())),
                         reverse=True)[:k]
        votes = {}
        for s, y in nearest: votes[y] = votes.get(y, 0) + math.exp(s / t)
        correct += max(sorted(votes), key=votes.get) == label
    return correct / len(query_labels)


def slow_pairs(x, t, include_self):
    "Uniformity as a double loop."
    x = F.normalize(x.double(), dim=1)
    overlaps = [math.exp(-t * (x[i] - x[j]).square().sum()) for i in range(len(x)) for j in range(len(x))
                if include_self or i != j]
    return math.log(sum(overlaps) / len(overlaps))


def slow_tolerance(x, labels, include_self):
    "Tolerance as a double loop."
    x = F.normalize(x.double(), dim=1)
    cosines = [float(x[i] @ x[j]) for i in range(len(x)) for j in range(len(x)) if labels[i] == labels[j]
               and (include_self or i != j)]
    return sum(cosines) / len(cosines)


class TestKNN:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("k, t", [(1, 0.1), (5, 0.07), (20, 0.1), (60, 1.0)])
    def test_is_the_vote_written_out(self, k, t, device):
        (bank, y), (queries, z) = cloud(seed=1), cloud(40, seed=1, noise=1.5)
        assert knn_accuracy(bank.to(device), y, queries.to(device), z, k, t) == slow_knn(bank, y, queries, z, k, t)

    @pytest.mark.parametrize("k, t", [(1, 0.1), (10, 0.07), (200, 0.1), (200, 0.5)])
    def test_lightly(self, k, t):
        knn_predict = pytest.importorskip("lightly.utils.benchmarking").knn_predict
        (bank, y), (queries, z) = cloud(500, 32, 10, seed=2, noise=2), cloud(200, 32, 10, seed=2, noise=3)
        predicted = knn_predict(F.normalize(queries, dim=1), F.normalize(bank, dim=1).T, y, 10, k, t)[:, 0]
        theirs = (predicted == z).double().mean().item()
        assert 0.2 < theirs < 0.99 and knn_accuracy(bank, y, queries, z, k, t) == theirs

    def test_blocks_change_nothing(self, monkeypatch):
        (bank, y), (queries, z) = cloud(90, seed=3), cloud(50, seed=3, noise=1.5)
        whole, blocks = knn_accuracy(bank, y, queries, z, 7), metrics._blocks
        monkeypatch.setattr(metrics, "_blocks", lambda rows, columns: blocks(rows, columns, entries=7 * columns))
        assert knn_accuracy(bank, y, queries, z, 7) == whole

    def test_small_t_is_the_nearest_and_large_t_the_majority(self):
        (bank, y), (queries, z) = cloud(101, classes=2, seed=4, noise=2), cloud(80, classes=2, seed=4, noise=2)
        majority = KNeighborsClassifier(25, metric="cosine").fit(bank.numpy(),
                                                                 y.numpy()).score(queries.numpy(), z.numpy())
        assert knn_accuracy(bank, y, queries, z, 25, t=1e-6) == knn_accuracy(bank, y, queries, z, 1) != majority
        assert knn_accuracy(bank, y, queries, z, 25, t=1e9) == majority

    def test_any_labels(self):
        bank, labels = torch.eye(3), torch.tensor([7, 10**15, 0])
        assert knn_accuracy(bank, labels, bank, labels, k=1) == 1
        assert knn_accuracy(bank, labels, bank, labels + 1, k=1) == 0  # labels that the bank does not hold
        assert knn_accuracy(bank, [1, 0, 2], torch.ones(1, 3), [0], k=3) == 1  # a tie goes to the smaller label

    @given(seed=seeds, scale=st.floats(1e-6, 1e6), k=st.integers(1, 40))
    @settings(max_examples=25, deadline=None)
    def test_order_rotation_and_length_do_not_matter(self, seed, scale, k):
        (bank, y), (queries, z) = (cloud(n, seed=seed % 1000, noise=noise, dtype=torch.float64)
                                   for n, noise in ((40, 1), (30, 2)))
        expected, turn = knn_accuracy(bank, y, queries, z, k), rotation(8, seed)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        assert knn_accuracy(scale * bank[order] @ turn, y[order], queries @ turn / scale, z, k) == expected


class TestLinearProbe:
    def fit(self, x, y, l2):
        "Standardised features and the solution of the exported solver on them."
        x = x.double()
        x = (x - x.mean(0)) / x.std(0, unbiased=False)
        return x, *metrics._fit_logistic(x, y, int(y.max()) + 1, l2)

    @pytest.mark.parametrize("n, d, l2", [(300, 10, 1e-1), (300, 10, 1e-4), (40, 100, 1e-3), (50, 512, 1e-3),
                                          (300, 1, 1e-3)])
    def test_is_the_optimum(self, n, d, l2):
        x, y = cloud(n, d, 5, seed=5, noise=2)
        x, weight, bias = self.fit(x * torch.logspace(-3, 3, d), y, l2)
        residual = (x @ weight.T + bias).softmax(1) - F.one_hot(y)
        assert (residual.T @ x / n + l2 * weight).abs().max() < 1e-5 and residual.mean(0).abs().max() < 1e-5

    @pytest.mark.parametrize("classes", [2, 6])
    def test_sklearn(self, classes):
        x, y = cloud(400, 12, classes, seed=6, noise=2)
        z, weight, bias = self.fit(x, y, 1e-3)
        # for two classes scikit-learn penalises the difference of the two weight vectors
        per_weight = 2 if classes == 2 else 1
        theirs = LogisticRegression(C=per_weight / (1e-3 * 400), tol=1e-9, max_iter=5000).fit(z.numpy(), y.numpy())
        assert torch.allclose((z @ weight.T + bias).softmax(1), torch.tensor(theirs.predict_proba(z.numpy())),
                              atol=1e-5)

    def test_accuracy_is_of_the_test_set(self):
        (x, y), (u, v) = cloud(300, 10, 5, seed=7, noise=2), cloud(200, 10, 5, seed=7, noise=3)
        u = 0.5 * u + 1  # a test set with another mean and scale: the training set's must be used
        mean, deviation = x.double().mean(0), x.double().std(0, unbiased=False)
        theirs = LogisticRegression(C=1 / (1e-3 * 300), tol=1e-9, max_iter=5000).fit(((x - mean) / deviation).numpy(),
                                                                                     y.numpy())
        expected = theirs.score(((u - mean) / deviation).numpy(), v.numpy())
        assert 0.3 < expected < 1 and linear_probe(x, y, u, v) == linear_probe(x.numpy(), y.numpy(), u.numpy(),
                                                                               v.numpy()) == expected

    def test_l2_decides(self):
        x, y = cloud(30, 20, 3, seed=8, noise=3)
        assert linear_probe(x, y, x, y, l2=1e-4) == 1 > linear_probe(x, y, x, y, l2=10.0)

    @given(seed=seeds)
    @settings(max_examples=10, deadline=None)
    def test_order_scale_shift_and_idle_columns_do_not_matter(self, seed):
        (x, y), (u, v) = (cloud(n, 5, 3, seed=seed % 1000, noise=2, dtype=torch.float64) for n in (80, 60))
        generator = torch.Generator().manual_seed(seed)
        order, scale, shift = (torch.randperm(80, generator=generator), torch.rand(5, generator=generator) + 0.01,
                               torch.randn(5, generator=generator))
        changed = lambda a, idle: torch.cat([a * scale + shift, torch.full((len(a), 1), idle)], 1)
        assert (linear_probe(changed(x[order], 1 / 3), y[order], changed(u, 1e9), v)
                == pytest.approx(linear_probe(x, y, u, v), abs=1.5 / 60))

    def test_a_column_that_varies_by_rounding_only_is_ignored(self):
        (x, y), (u, v) = (cloud(300, 5, 3, seed=9, noise=2, dtype=torch.float64),
                          cloud(200, 5, 3, seed=9, noise=2, dtype=torch.float64))
        leak = lambda labels, size: 0.1 + size * labels[:, None].double()
        beside = lambda size: linear_probe(torch.cat([x, leak(y, size)], 1), y, torch.cat([u, leak(v, size)], 1), v)
        assert beside(1e-9) == linear_probe(x, y, u, v) < 0.95 < beside(1e-6)

    def test_warns_when_short_of_the_optimum(self):
        x, y = cloud(50, 5, 3, seed=9)
        with pytest.warns(RuntimeWarning, match="stopped short of the optimum"):
            metrics._fit_logistic(x.double(), y, 3, 1e-3, steps=2)

    def test_inside_inference_mode_and_with_gradients(self):
        x, y = cloud(50, 5, 3, seed=10, dtype=torch.float64)
        expected = linear_probe(x, y, x, y)
        assert linear_probe(x.clone().requires_grad_(), y, x.clone().requires_grad_(), y) == expected
        with torch.inference_mode(): assert linear_probe(x * 1, y * 1, x * 1, y * 1) == expected


class TestAlignment:
    @pytest.mark.parametrize("alpha", [1, 2, 3.5])
    def test_align_uniform(self, alpha):
        x, y = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
        assert alignment(x, y, alpha) == pytest.approx((u - v).norm(p=2, dim=1).pow(alpha).mean().item(), rel=1e-12)

    def test_exact_values(self):
        axes = torch.eye(6)
        assert alignment(axes, 3 * axes) == 0 and alignment(axes, -axes) == pytest.approx(4)
        assert alignment(axes, axes.roll(1, 0)) == pytest.approx(2, rel=1e-6)
        assert alignment(torch.tensor([[1., 1e-5]]), torch.tensor([[1., -1e-5]])) == pytest.approx(4e-10, rel=1e-4)


class TestUniformity:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("include_self", [False, True])
    @pytest.mark.parametrize("t", [0.5, 2, 10])
    def test_double_loop(self, t, include_self, device):
        x, _ = cloud(30)
        assert uniformity(x.to(device), t, include_self) == pytest.approx(slow_pairs(x, t, include_self), abs=1e-5)

    @pytest.mark.parametrize("n", [2, 3, 257])
    def test_align_uniform(self, n):
        x = F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(n), dtype=torch.float64), dim=1)
        assert uniformity(x) == pytest.approx(torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log().item(), abs=1e-12)

    def test_exact_values(self):
        n, t = 7, 2
        axes = torch.eye(n)
        assert uniformity(axes) == pytest.approx(-2 * t, abs=1e-6)
        assert uniformity(axes - 1 / n) == pytest.approx(-2 * t * n / (n - 1), abs=1e-5)  # the regular simplex
        assert uniformity(torch.cat([axes[:1], -axes[:1]]), t=3) == pytest.approx(-12, abs=1e-5)  # antipodes
        assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6) and uniformity(torch.ones(5, 3)) <= 0
        assert uniformity(torch.ones(5, 3), include_self=True) == pytest.approx(0, abs=1e-6)
        assert uniformity(axes, include_self=True) == pytest.approx(math.log((1 + (n - 1) * math.exp(-4)) / n),
                                                                    abs=1e-6)

    def test_limits_of_t(self):
        x, _ = cloud(50, dtype=torch.float64)
        distances = torch.pdist(F.normalize(x, dim=1)).square()
        assert uniformity(x, t=1e-6) / 1e-6 == pytest.approx(-distances.mean().item(), rel=1e-4)
        # exp of every term underflows
        assert uniformity(x, t=1e6) / 1e6 == pytest.approx(-distances.min().item(), rel=1e-3)

    @pytest.mark.parametrize("include_self", [False, True])
    def test_memory_is_linear(self, monkeypatch, include_self):
        x, cosines, largest = cloud(2000, 4)[0], metrics._cosines, []
        blocks = metrics._blocks
        monkeypatch.setattr(metrics, "_cosines", lambda a, b: largest.append(len(a) * len(b)) or cosines(a, b))
        whole = uniformity(x, include_self=include_self)
        monkeypatch.setattr(metrics, "_blocks", lambda rows, columns: blocks(rows, columns, entries=100_000))
        assert uniformity(x, include_self=include_self) == pytest.approx(whole, abs=1e-6)
        assert largest[0] == 2000**2 and max(largest[1:]) <= 100_000 and len(largest) > 40


class TestTolerance:
    @pytest.mark.parametrize("include_self", [False, True])
    @pytest.mark.parametrize("n, classes", [(20, 2), (31, 5)])
    def test_double_loop(self, n, classes, include_self):
        x, labels = cloud(n, classes=classes)
        assert tolerance(x, labels, include_self) == pytest.approx(slow_tolerance(x, labels, include_self), abs=1e-7)

    def test_dystress_evaluation(self):
        "The released script's double sum over n²/10 is include_self=True on ten equal classes, and only there."
        for sizes, same in (([9] * 10, True), ([9] * 20, False), ([30] * 5 + [5] * 5, False)):
            labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            x = F.normalize(torch.randn(len(labels), 6, generator=torch.Generator().manual_seed(0),
                                        dtype=torch.float64) + 0.5, dim=1)
            released = (x @ x.T)[labels[:, None] == labels].sum() / (len(x)**2 / 10)
            assert (abs(tolerance(x, labels, include_self=True) - released) < 1e-9) == same

    def test_exact_values(self):
        axes = torch.eye(4)
        assert tolerance(axes, [0, 0, 1, 1]) == pytest.approx(0, abs=1e-12)
        assert tolerance(axes, [0, 0, 1, 1], include_self=True) == pytest.approx(0.5)
        assert (tolerance(torch.ones(4, 3), [0, 0, 1, 1]) == pytest.approx(1)
                == tolerance(torch.ones(4, 3), [0, 0, 1, 1], include_self=True))
        assert tolerance(torch.cat([axes, -axes]), [0, 1, 2, 3] * 2) == pytest.approx(-1)
        assert tolerance(axes - 0.25, [5] * 4) == pytest.approx(-1 / 3)  # the regular simplex

    @pytest.mark.parametrize("include_self", [False, True])
    def test_by_class(self, include_self):
        x, labels = cloud(40, classes=3)
        labels[0] = 99
        values = class_tolerance(x, labels, include_self)
        assert list(values) == sorted(set(labels.tolist())) and (math.isnan(values.pop(99)) or include_self)
        for label, value in values.items():
            assert value == pytest.approx(slow_tolerance(x[labels == label], labels[labels == label], include_self),
                                          abs=1e-7)
        pairs = {label: int((labels == label).sum()) for label in values}
        pairs = {label: n * n if include_self else n * (n - 1) for label, n in pairs.items()}
        mean = ((sum(pairs[label] * values[label] for label in values) + include_self)
                / (sum(pairs.values()) + include_self))
        assert tolerance(x, labels, include_self) == pytest.approx(mean, abs=1e-9)


GEOMETRY = {"uniformity": lambda x, y: uniformity(x),
            "uniformity with self": lambda x, y: uniformity(x, include_self=True),
            "tolerance": tolerance, "tolerance with self": lambda x, y: tolerance(x, y, include_self=True),
            "alignment": lambda x, y: alignment(x, x.roll(1, 1))}


@pytest.mark.parametrize("name", GEOMETRY)
@given(seed=seeds, scale=st.floats(1e-8, 1e8), n=st.integers(6, 40))
@settings(max_examples=20, deadline=None)
def test_geometry_sees_neither_order_nor_rotation_nor_length(name, seed, scale, n):
    measure, (x, labels) = GEOMETRY[name], cloud(n, classes=3, seed=seed % 1000, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    lengths = scale * (1 + torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    value = measure(x, labels)
    assert isinstance(value, float) and measure((lengths * x)[order], labels[order]) == pytest.approx(value, abs=1e-9)
    if name != "alignment": assert measure(x @ rotation(8, seed), labels) == pytest.approx(value, abs=1e-9)
    else: assert alignment(x @ rotation(8, seed), x.roll(1, 1) @ rotation(8, seed)) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_widened_first(name, dtype):
    x, labels = cloud(50, dtype=dtype)
    assert GEOMETRY[name](x, labels) == pytest.approx(GEOMETRY[name](x.double(), labels), abs=2e-6)


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e25, 1e37])
def test_lengths_whose_square_is_not_a_float32(name, scale):
    x, labels = cloud(50)
    assert GEOMETRY[name](scale * x, labels) == pytest.approx(GEOMETRY[name](x, labels), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_readers_take_any_float_type(dtype):
    (bank, y), (queries, z) = cloud(80, dtype=dtype), cloud(40, noise=1.5, dtype=torch.float32)
    assert knn_accuracy(bank, y, queries, z, 5) == knn_accuracy(bank.float(), y, queries, z, 5)
    assert linear_probe(bank, y, queries, z) == linear_probe(bank.double(), y, queries, z)


def test_autocast_changes_nothing():
    (x, y), (u, v) = cloud(80, noise=1.5), cloud(60, noise=1.5)
    values = lambda: (uniformity(x), tolerance(x, y), alignment(x, x.roll(1, 1)), knn_accuracy(x, y, u, v, 9),
                      linear_probe(x, y, u, v))
    expected = values()
    with torch.autocast("cpu", dtype=torch.bfloat16): assert values() == expected


def test_a_row_of_zeros_has_no_direction():
    x = torch.eye(3).index_fill(0, torch.tensor(1), 0)
    assert tolerance(x, [0, 0, 0]) == 0 and math.isfinite(uniformity(x)) and knn_accuracy(x, [0, 1, 2], x, [0, 1, 2],
                                                                                          k=1) >= 2 / 3


X, Y = cloud(12)
NAN = X.clone().index_fill(0, torch.tensor(7), math.nan)
KNN = lambda **change: knn_accuracy(**{**dict(bank=X, bank_labels=Y, queries=X, query_labels=Y, k=3), **change})
PROBE = lambda **change: linear_probe(**{**dict(train_x=X, train_y=Y, test_x=X, test_y=Y), **change})
REFUSED = [
    (lambda: KNN(k=13), "k: 13 came; give a whole number of at least 1 and at most 12"),
    (lambda: KNN(k=0), "k: 0"),
    (lambda: KNN(k=2.5), "k: 2.5"), (lambda: KNN(t=0), "t: 0"), (lambda: KNN(t=math.nan), "t: nan"),
    (lambda: KNN(bank=NAN), "bank: row 7 holds NaN"),
    (lambda: KNN(queries=X / 0), "queries: row 0 holds NaN or infinity"),
    (lambda: KNN(queries=X[:, :3]), "queries: 3 columns against 8 of bank"),
    (lambda: KNN(bank=X[:0]), "bank: shape (0, 8)"),
    (lambda: KNN(bank=X.long()), "bank: torch.int64"),
    (lambda: KNN(bank_labels=Y.float()), "bank_labels: torch.float32"),
    (lambda: KNN(bank_labels=Y[:4]), "bank_labels: shape (4,)"),
    (lambda: KNN(query_labels=Y[:, None]), "query_labels: shape (12, 1)"),
    (lambda: KNN(query_labels=Y - 1), "query_labels: -1 is out of range"),
    (lambda: KNN(bank_labels=Y > 1), "bank_labels: torch.bool"),
    (lambda: PROBE(train_x=NAN), "train_x: row 7"), (lambda: PROBE(test_x=NAN), "test_x: row 7"),
    (lambda: PROBE(l2=0), "l2: 0"),
    (lambda: PROBE(train_y=Y * 0), "train_y: only label 0"),
    (lambda: PROBE(test_x=X[:, 1:]), "test_x: 7 columns against 8 of train_x"),
    (lambda: PROBE(test_y=Y[1:]), "test_y: shape (11,)"), (lambda: PROBE(train_y=Y.double()), "train_y: torch.float64"),
    (lambda: alignment(X, X[1:]), "y: shape (11, 8) against (12, 8) of x"), (lambda: alignment(X, NAN), "y: row 7"),
    (lambda: alignment(X, X, alpha=0), "alpha: 0"), (lambda: alignment(X[0], X[0]), "x: shape (8,)"),
    (lambda: uniformity(X[:1]), "x: shape (1, 8); give (N, D) with N at least 2"),
    (lambda: uniformity(NAN), "x: row 7"),
    (lambda: uniformity(X, t=-1), "t: -1"), (lambda: uniformity(X, t=math.inf), "t: inf"),
    (lambda: uniformity(Y), "x: torch.int64"),
    (lambda: tolerance(X, Y[:3]), "labels: shape (3,)"), (lambda: tolerance(X, -Y), "labels: -3 is out of range"),
    (lambda: tolerance(NAN, Y), "x: row 7"),
    (lambda: tolerance(X, torch.arange(12)), "labels: 12 different labels for as many rows"),
    (lambda: class_tolerance(X, Y.float()), "labels: torch.float32")]


@pytest.mark.parametrize("call, message", REFUSED, ids=[message.split(";")[0] for _, message in REFUSED])
def test_refuses(call, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)): call()
