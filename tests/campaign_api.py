"""Bad arguments for every public call: what is called, and what the one line that refuses it must name.

Each function gives the cases of one area as (name, call, pattern, errors): `call` must raise one of `errors` (default:
TypeError or ValueError), with a message of one line that the pattern finds. `campaign.py` tries them all.
"""
import io
import random
import tarfile
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from torch import nn

from lab_toys import make_lab, make_row
from temp_nce.checks import short

NAN, INF = float("nan"), float("inf")
PLAIN = (int, float, complex, str, bytes, type(None), Path)  # values that name a case; others do by their type


class Case(NamedTuple):
    name: str
    call: Callable
    pattern: str
    errors: tuple = (TypeError, ValueError)


def values(area: str, make: Callable, table: dict, pattern: str = "{}") -> Iterator[Case]:
    "A case for each argument and each of its bad values."
    for name, bad in table.items():
        for value in bad:
            shown = short(value, 30) if isinstance(value, PLAIN) else type(value).__name__
            yield Case(f"{area} {name}={shown}", partial(make, **{name: value}), pattern.format(name))


# --- losses -----------------------------------------------------------------------------------------------------------

def _batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)


def _no_rows(x: torch.Tensor) -> dict:
    "What is no finite matrix of embeddings."
    return {"list": [[1.0]], "None": None, "text": "x", "int": x.long(), "bool": x > 0,
            "complex": x.to(torch.complex64), "float8": x.to(torch.float8_e4m3fn), "vector": x[0], "scalar": x[0, 0],
            "cube": x[None], "no rows": x[:0], "no columns": x[:, :0], "NaN": torch.where(x > 1, x, NAN),
            "infinity": torch.where(x > 1, x, INF), "sparse": x.to_sparse(), "CSR": x.to_sparse_csr()}


def _calls() -> dict:
    "Every loss, as a function of two views."
    from temp_nce import losses as L
    u, index, labels = torch.zeros(6), torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])
    pairs = (L.NTXentLoss, L.InfoNCELoss, L.MACLLoss, L.DualTemperatureLoss, L.DCLLoss, L.DCLWLoss)
    calls = {kind: lambda x, y, kind=kind, **options: kind(**options)(x, y) for kind in pairs}
    calls[L.UncertaintyLoss] = lambda x, y, **options: L.UncertaintyLoss(**options)(x, y, u, u)
    calls[L.ISogCLRLoss] = lambda x, y, **options: L.ISogCLRLoss(samples=6, **options)(x, y, index)
    calls[L.MultipleNegativesRankingLoss] = (
        lambda x, y, **options: L.MultipleNegativesRankingLoss(**options)([x, y]))
    for kind in (L.SupConLoss, L.LabelledNTXentLoss):
        calls[kind] = lambda x, y, kind=kind, **options: kind(**options)(x, labels)
    return calls


TEMPERATURES = [0, -1, NAN, INF, "x", True, [], 10**400, 1e-300, "0", "-1", "nan", "free(", "dystress(1)",
                "dystress(a=1)", "0.5; import os", "__import__('os')", {}, torch.tensor(0.5), b"0.5", 1j,
                "dystress(0.2,0.1)", "learnable(2)", "cosine(0.1,1,0)", "9" * 500, "(" * 5000]


def losses(folder: Path) -> Iterator[Case]:
    x, y = _batch()
    for kind, call in _calls().items():
        name, labelled = kind.__name__, "embeddings" in str(kind.forward.__annotations__)
        rows = "z0|query|sentence_features|embeddings", "z1|positive_key|sentence_features"
        for what, bad in _no_rows(x).items():
            yield Case(f"{name} of {what}", partial(call, bad, y), rows[0])
            if not labelled: yield Case(f"{name} second of {what}", partial(call, x, bad), rows[1])
        if not labelled:
            yield Case(f"{name} other rows", partial(call, x, y[:3]), rows[1])
            yield Case(f"{name} other width", partial(call, x, y[:, :3]), rows[1])
        yield from values(name, partial(call, x, y), {
            "reduction": ("avg", None, 3, ["mean"], "Mean"), "tile": (0, -1, "x", 1.5, True, [2]),
            "gather_distributed": ("yes", 2, None)})
        if name != "ISogCLRLoss":
            yield from values(name, partial(call, x, y), {"temperature": TEMPERATURES}, "temperature|tau")
    yield from _own_options(x, y)


def _own_options(x: torch.Tensor, y: torch.Tensor) -> Iterator[Case]:
    from temp_nce.losses import (DCLLoss, DCLWLoss, DualTemperatureLoss, InfoNCELoss, ISogCLRLoss, MACLLoss,
                                 MemoryBank, MultipleNegativesRankingLoss, NTXentLoss, UncertaintyLoss, info_nce)
    index, u, labels = torch.arange(6), torch.zeros(6), torch.tensor([0, 0, 1, 1, 2, 2])
    positive = (0, -1, "x", None, NAN)
    yield from values("iSogCLR", ISogCLRLoss, dict(
        tau_init=(*positive, 2), rho=("x", None, NAN, INF, []), gamma=(0, 2, "x", None, NAN), beta=(0, -1, "x", None),
        eta=(0, "x", NAN), tau_min=(0, 0.2, "x"), tau_max=(0.01, "x", None),
        samples=(-1, 1.5, "x", None, True, 10**30)))
    yield from values("iSogCLR", partial(ISogCLRLoss(samples=6), x, y), dict(
        index=(None, [0, 1], "x", index.float(), index[:3], index + 3, index - 1, index[None], index.int())))
    yield from values("MACL", MACLLoss, dict(alpha=(-1, "x", None, NAN, INF, []), A_0=(-1, 2, "x", None, NAN)))
    yield from values("dual", DualTemperatureLoss, dict(m=(*positive, INF)))
    yield from values("DCLW", DCLWLoss, dict(sigma=positive))
    weights = (3, "x", lambda u, v: torch.ones(3), lambda u, v: "x", lambda u, v: u.sum(1) * NAN)
    yield from values("DCL", lambda weight_fn: DCLLoss(weight_fn=weight_fn)(x, y), dict(weight_fn=weights))
    column = (None, [0] * 6, "x", u[:3], u[:, None], u.long(), u * NAN, u.to_sparse())
    yield from values("uncertainty", lambda u0=u, u1=u: UncertaintyLoss()(x, y, u0, u1), dict(u0=column, u1=column))
    yield from values("uncertainty", UncertaintyLoss, dict(positive_in_denominator=("x", 1, None)))
    for bad in (None, x[:, :1], x[0]): yield Case("uncertainty.compare", partial(
        UncertaintyLoss().compare, bad, y, {}), "z0")
    yield Case("iSogCLR.compare without index", partial(ISogCLRLoss(samples=6).compare, x, y, {}), "context")
    banks = (0.5, "x", -1, (3,), (3, -1), (3, "x"), (1, 2, 3), None, True, [5, 2.5], 10**30, (8, 3))
    for kind in (NTXentLoss, InfoNCELoss):
        yield from values(kind.__name__, lambda memory_bank_size, kind=kind: kind(memory_bank_size=memory_bank_size)(
            x, y), dict(memory_bank_size=banks))
    yield Case("MemoryBank 0", partial(MemoryBank, 0), "size")
    yield Case("MemoryBank.push", partial(MemoryBank((8, 3)).push, x), "memory_bank_size")
    keys = (x * NAN, x[:, :3], x[0], x[0, 0], "x", [1], x.long(), x[:0], torch.randn(3, 2, 4), torch.randn(6, 2, 3),
            torch.randn(6, 0, 4), x.to_sparse())
    yield from values("info_nce", partial(info_nce, x, y), dict(negative_keys=keys))
    yield Case("info_nce both ways with keys", partial(info_nce, x, y, x, symmetric=True), "symmetric")
    yield Case("InfoNCE both ways with a bank", partial(InfoNCELoss, symmetric=True, memory_bank_size=4), "symmetric")
    yield Case("InfoNCE symmetric", partial(InfoNCELoss, symmetric="x"), "symmetric")
    yield Case("InfoNCE bank and keys", partial(InfoNCELoss(memory_bank_size=4), x, y, x), "negative_keys")
    ranking = MultipleNegativesRankingLoss
    yield from values("ranking", ranking, dict(scale=(*positive[:3], True, NAN), model=(3, "x")))
    yield from values("ranking", ranking(), dict(
        sentence_features=([], [x], None, 3, "ab", x, [x, y, x[:2]], {"a": x}, [x, y, None])))
    yield Case("ranking model without embedding", partial(ranking(model=nn.Identity()), [{"a": x}, {"a": y}]),
               "sentence_features")
    yield from _labelled(x, labels)


def _labelled(x: torch.Tensor, labels: torch.Tensor) -> Iterator[Case]:
    from temp_nce.losses import LabelledNTXentLoss, SupConLoss
    i = torch.tensor([0, 1])
    pairs = ((), (i,), (i, i), (i,) * 5, "x", 3, (i, i + 9, i, i), (i, i - 3, i, i), (i.float(), i, i, i),
             (i, i[:1], i, i), (i, i, None, i), (i[None], i, i, i))
    for kind in (SupConLoss, LabelledNTXentLoss):
        yield from values(kind.__name__, partial(kind(), x), dict(
            labels=(None, labels[:3], [0, 0], labels[:, None], "x", labels * NAN, 3, labels.to("meta"), {"a": 1})))
        yield from values(kind.__name__, partial(kind(), x), dict(indices_tuple=pairs))
        reference = partial(kind(), x, labels, ref_labels=labels)
        yield from values(kind.__name__, reference, dict(ref_emb=(x[:, :3], x * NAN, "x", x[0], x.long(), x[:0])))
        yield from values(kind.__name__, partial(kind(), x, labels, ref_emb=x), dict(ref_labels=(None, labels[:2])))
        yield Case(f"{kind.__name__} ref_labels alone", partial(kind(), x, labels, ref_labels=labels), "ref_labels")
    yield Case("LabelledNTXentLoss none", partial(LabelledNTXentLoss, reduction="none"), "reduction")


# --- temperatures -----------------------------------------------------------------------------------------------------

NO_TEMPERATURE = [
    None, True, [], {}, 0, -1, NAN, 10**400, "", "x", "0", "nan", "inf", "free(1)", "free(", "fixed(0)", "fixed('x')",
    "learnable(0)", "learnable(init=5)", "dystress(0.2,0.1)", "dystress(shape='x')", "dystress(a=1)", "cosine(1,2,-1)",
    "a" * 100000, "(" * 100000, "9" * 100000, "1e400", "os.system('x')", "lambda: 1", "0.5 0.5", "\0", "\u2028",
    "free\nfree", b"free", object(), torch.tensor([1.0, 2.0]), 1j, "dystress(*[1])", "dystress(**{})", "fixed(True)",
    "dystress(0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9)", "fixed([1])", "fixed(1j)", "fixed(None)", "dystress(detach=3)",
    "dystress(k=0)", "dystress(delta='x')", "dystress(shape='shifted',k=0)", "fixed(-1)", "cosine(period='x')",
    "cosine(0,1)"]
NO_LOSS = ["macl(alpha=-1)", "macl(alpha='x')", "macl(gather_distributed='x')", "macl(tile=0)", "macl(reduction='x')",
           "dual(0)", "isogclr(tau_min=3)", "isogclr(samples=-1)", "isogclr(rho='x')", "isogclr(gamma=2)", "nosuch",
           "uncertainty(0.1,'x')", "dclw(sigma=0)", "dcl(0.1,3)", "dcl(0.1,weight_fn='x')",
           "prototypes(prototypes=0)", "prototypes(epsilon=0)", "prototypes(features='x')", "siglip(bias='x')",
           "siglip('hot')", "tempnet(rho='x')", "tempnet(tau_min=3)", "tempnet(samples=-1)"]


def temperatures(folder: Path) -> Iterator[Case]:
    from temp_nce import (CosineSchedule, DySTreSS, FixedTemperature, LearnableTemperature, TemperatureFree, make_loss,
                          make_temperature)
    yield from values("make_temperature", make_temperature, dict(spec=NO_TEMPERATURE), "temperature|tau")
    yield from values("make_loss", make_loss, dict(spec=NO_TEMPERATURE + NO_LOSS), "temperature|tau")
    yield from values("DySTreSS", partial(DySTreSS, shape="shifted"), dict(
        tau_min=(0, None, "x", 1e-40), tau_max=(0, None, 0.01), detach=("x", None, 3), stabilise=("x", 3),
        delta=("x", None, 2, NAN), k=(0, "x", None, NAN)))
    yield from values("DySTreSS", DySTreSS, dict(shape=("x", None, 3, [])))
    yield from values("learnable", LearnableTemperature, dict(init=(0, 2, "x", 1e-3), max_scale=(0, "x", 0.5)))
    yield from values("cosine", CosineSchedule, dict(tau_min=(0, 2, "x"), tau_max=(0, "x"), period=(0, "x", None)))
    kinds = FixedTemperature(), TemperatureFree(), DySTreSS(), CosineSchedule(), LearnableTemperature()
    for kind in kinds:
        yield from values(type(kind).__name__, kind, dict(similarity=("x", None, [0.5], 3, torch.tensor([1]))))
    for kind in (DySTreSS(stabilise=True), CosineSchedule()):
        for epoch in ((1.5, 2), ("x", 3), (None, 1), (0, 0), (-1, 3), (0, True)):
            yield Case(f"{type(kind).__name__}.set_epoch{epoch}", partial(kind.set_epoch, *epoch), "epoch")


# --- metrics ----------------------------------------------------------------------------------------------------------

def metrics(folder: Path) -> Iterator[Case]:
    from temp_nce import alignment, class_tolerance, knn_accuracy, linear_probe, tolerance, uniformity
    (x, _), y = _batch(), torch.tensor([0, 1, 0, 1, 0, 1])
    rows = [*_no_rows(x).values(), x.to("meta")]
    labels = (None, "x", [0, 1], y.float(), y[:3], y[:, None], y - 1, y > 0, [[0]], y.to_sparse(), y.to("meta"))
    knn = lambda bank=x, bank_labels=y, queries=x, query_labels=y, k=1, t=0.1: knn_accuracy(
        bank, bank_labels, queries, query_labels, k, t)
    probe = lambda train_x=x, train_y=y, test_x=x, test_y=y, l2=1e-3: linear_probe(train_x, train_y, test_x, test_y, l2)
    positive = (0, -1, NAN, INF, "x", None, [1])
    yield from values("knn", knn, dict(bank=rows, queries=rows), "{}|queries: |bank_labels: shape")
    yield from values("knn", knn, dict(bank_labels=labels, query_labels=labels, k=(0, 7, -1, 1.5, "x", None, True),
                                       t=positive))
    yield from values("probe", probe, dict(train_x=rows, test_x=rows), "{}|test_x: |train_y: shape|test_y: shape")
    yield from values("probe", probe, dict(train_y=(*labels, y * 0), test_y=labels, l2=positive))
    yield from values("alignment", lambda x=x, y=x, alpha=2: alignment(x, y, alpha), dict(
        x=rows, y=[*rows, x[:3]], alpha=positive), "{}: |y: shape")
    yield from values("uniformity", lambda x=x, t=2: uniformity(x, t), dict(x=[*rows[:2], *rows[3:], x[:1]],
                                                                            t=positive), "{}: ")
    for call in (tolerance, class_tolerance):
        yield from values(call.__name__, lambda x=x, labels=y, call=call: call(x, labels), dict(x=rows, labels=labels),
                          "{}: |labels: shape")
    yield Case("tolerance without a pair", partial(tolerance, x, torch.arange(6)), "labels")


# --- images -----------------------------------------------------------------------------------------------------------

def _images(value: int = 0):
    from temp_nce.images import Images
    return Images(torch.full((6, 3, 8, 8), value, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1]), ("a", "b"))


def images(folder: Path) -> Iterator[Case]:
    from temp_nce.images import Images, long_tail
    good = _images()
    pixels, labels = good.images, good.labels
    make = lambda images=pixels, labels=labels, classes=("a", "b"): Images(images, labels, classes)
    yield from values("Images", make, dict(
        images=(None, "x", [1], pixels.float(), pixels[0], pixels[:, :1], pixels[:3], pixels.to_sparse(),
                pixels.numpy(), pixels.to("meta")),
        labels=(None, "x", [0] * 6, labels.float(), labels[:3], labels - 1, labels + 5, labels[:, None]),
        classes=(None, 3, (), ("a",), "ab", (1, 2))), "{}|labels: ")
    for bad in (0, "x", torch.tensor([0.5]), None, [[0]], 1.5):
        yield Case(f"Images[{bad}]", partial(good.__getitem__, bad), "rows")
    for bad in ([9], [-9], torch.ones(4, dtype=torch.bool)):
        yield Case(f"Images[{bad}]", partial(good.__getitem__, bad), "rows", (IndexError,))
    yield from values("Images.to", good.to, dict(device=("tpu", None, 3.5, "cuda:99", "cuda:x", "")))
    yield from values("subset", lambda n=2, seed=0: good.subset(n, seed), dict(
        n=(0, -1, 7, "x", None, 1.5, True), seed=("x", None, 1.5, -1, 2**70)))
    yield from values("long_tail", lambda images=good, ratio=0.5, seed=0: long_tail(images, ratio, seed), dict(
        images=(None, 3, pixels), ratio=(0, -1, 2, "x", None, NAN, 1e-9), seed=("x", None, -1)))
    yield from _image_files(folder)
    yield from _views(pixels)
    yield from _models(folder)


def _image_files(folder: Path) -> Iterator[Case]:
    from temp_nce.images.data import load_images
    def put(name: str, **content: bytes) -> Path:
        for way, raw in content.items():
            path = folder / name / way.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        (folder / name).mkdir(exist_ok=True)
        return folder / name
    load = lambda name="digits", root=folder, split="train", size=None: load_images(name, root, split, size)
    yield from values("load_images", load, dict(
        name=("nosuch", None, 3, "", "../nosuch", "\0", "a" * 5000, "a" * 300, []), root=(3, None),
        split=("x", None, 3, "", "val"), size=(0, -1, "x", 1.5, True, 2**40)))
    yield from values("moved digits", partial(load, "moved-digits"), dict(size=(0, -1, "x", 1.5, 4)))
    for name, path, says in (("no classes", put("none"), "no class folders"),
                             ("empty class", put("empty", **{"train__a__x.txt": b""}), "without an image"),
                             ("no image", put("broken", **{"train__a__x.png": b"no image"}), "x.png"),
                             ("file", put("file", f=b"x") / "f", "name: ")):
        yield Case(f"load_images folder: {name}", partial(load, path), says)
    both = (ValueError, FileNotFoundError)
    for name, way, raw in (("cifar10", "cifar-10-batches-bin__batches.meta.txt", b"a\nb\n"),
                           ("cifar100", "cifar-100-binary__fine_label_names.txt", b"\xff\xfe\n"),
                           ("tiny-imagenet", "tiny-imagenet-200__train__n1__x.JPEG", b""),
                           ("imagenette", "imagenette2-160__train__n1__x.JPEG", b"")):
        yield Case(f"load_images damaged {name}", partial(load, name, put(f"damaged-{name}", **{way: raw})),
                   str(folder), both)
    planted = {f"cifar-10-batches-py__{name}": pickled(folder) for name in ("data_batch_1", "batches.meta")}
    yield Case("load_images planted pickles", partial(load, "cifar10", put("planted", **planted)), "planted", both)


def pickled(folder: Path) -> bytes:
    "A pickle that leaves a mark when it is opened; `campaign.py` looks for the mark."
    return f"cos\nsystem\n(S'touch {folder}/EXECUTED'\ntR.".encode()


def _views(pixels: torch.Tensor) -> Iterator[Case]:
    from temp_nce.images.augment import ViewConfig, make_views, test_view
    no_pixels = (None, "x", [1], pixels.float(), pixels[0], pixels[:, :1])
    make = lambda images=pixels, config="plain", **more: make_views(images, config, **more)
    yield from values("make_views", make, dict(
        images=no_pixels, config=(None, 3, "nosuch", [], {}), n_views=(0, -1, "x", None, 1.5), generator=(3, "x"),
        dtype=(3, "x", None, torch.int32)))
    yield from values("test_view", lambda images=pixels, config="plain": test_view(images, config), dict(
        images=no_pixels, config=(None, "nosuch")))
    yield from values("ViewConfig", ViewConfig, dict(
        size=(0, -1, "x", None, 1.5),
        scale=((0, 1), (1, 0.5), "x", None, (0.5,), (0.1, 2), ("a", "b"), (NAN, 1)),
        ratio=((0, 1), (2, 1), "x", None, (1,), (1, INF)), flip=(-1, 2, "x", None, NAN), jitter=(2, "x"),
        brightness=(-1, "x", None, INF, NAN), contrast=(-1,), saturation=(-1,), hue=(-1, 0.6, "x"), gray=(2,),
        blur=(-1, "x"), sigma=((0, 1), (2, 1), "x", (1,)), normalize=("nosuch", None, 3, []),
        test_resize=(1, "x", -5, 1.5)))


def _models(folder: Path) -> Iterator[Case]:
    from temp_nce.images.models import load_encoder, make_encoder, make_head, save_encoder
    names = ("nosuch", None, 3, "", [])
    yield from values("make_encoder", lambda name="conv3", stem="cifar": make_encoder(name, stem), dict(
        name=names, stem=(*names, "imagenet")))
    widths = (0, -1, "x", 1.5)
    yield from values("make_head", partial(make_head, in_features=4), dict(name=names))
    yield from values("make_head", partial(make_head, "lightly"), dict(in_features=(*widths, None)))
    yield from values("make_head", partial(make_head, "lightly", 4), dict(out_features=(*widths, None),
                                                                          hidden_features=widths))
    for bad in (None, nn.Linear(2, 2), 3):
        yield Case("save_encoder", partial(save_encoder, bad, folder / "none.pt"), "encoder")
    path = save_encoder(make_encoder("conv3"), folder / "encoder.pt")
    good, raw = torch.load(path, weights_only=True), path.read_bytes()
    weights = good["encoder"]
    first = next(iter(weights))
    def saved(name: str, content: object) -> Path:
        path = folder / f"encoder-{name}.pt"
        if isinstance(content, bytes): path.write_bytes(content)
        else: torch.save(content, path)
        return path
    contents = {
        "cut": raw[:1000], "empty": b"", "junk": b"junk" * 100, "pickle": pickled(folder), "list": [1],
        "no config": {"encoder": weights}, "config list": good | {"config": [1]},
        "unknown": good | {"config": {"encoder": "nosuch"}}, "number": good | {"config": {"encoder": 3}},
        "stem": good | {"config": {"encoder": "conv3", "stem": "imagenet"}},
        "missing": good | {"encoder": dict(list(weights.items())[1:])},
        "shape": good | {"encoder": weights | {first: torch.zeros(3)}},
        "text": good | {"encoder": weights | {first: "x"}}, "more": good | {"encoder": weights | {"z": torch.zeros(3)}},
        "type": good | {"encoder": weights | {first: weights[first].long()}}}
    for name, content in contents.items():
        yield Case(f"load_encoder {name}", partial(load_encoder, saved(name, content)), "path: ")
    yield Case("load_encoder None", partial(load_encoder, None), "path: ")
    yield Case("load_encoder missing", partial(load_encoder, folder / "nosuch.pt"), "nosuch.pt", (FileNotFoundError,))


# --- training ---------------------------------------------------------------------------------------------------------

def training(folder: Path) -> Iterator[Case]:
    from temp_nce.images.simclr import Recipe, check_parameters, pretrain
    good, stated = _images(), asdict(Recipe())
    yield from values("Recipe", Recipe, dict(
        temperature=("x", None, 0, -1, [], True), encoder=("x", None, 3), stem=("x", 3, "imagenet"), head=("x",),
        projection=(0, -1, 1.5, "x", None), views=("x", None), view_size=(-1, "x", 1.5),
        epochs=(0, -1, "x", 1.5, None, True, NAN), batch_size=(1, 0, "x", 2.5), optimizer=("x", None),
        lr=(-1, "x", None, NAN, INF), lr_batch=(-1, "x"), momentum=(-1, "x", NAN), weight_decay=(-1, "x"),
        warmup_epochs=(-1, 10, 20, "x"), precision=("x", "fp16", None), joint_views=(3, "x", None),
        channels_last=("x", 1), compile=("x",), knn_every=(0, "x"), knn_k=(0, "x"), knn_t=(0, "x", NAN),
        seed=(-1, "x", 1.5, None, 2**70)))
    yield Case("Recipe head none", partial(Recipe, head="none", temperature="uncertainty"), "head")
    for bad in (None, 3, [], {}, {"temperature": "0.5"}):
        yield Case(f"check_parameters {bad}", partial(check_parameters, bad), "parameters: ")
    for bad in (10, "x", -1, 1.5, True):
        yield Case(f"check_parameters train_size={bad}", partial(check_parameters, stated | {"train_size": bad}),
                   "batch_size|train_size|knn_k")
    recipe = Recipe(encoder="conv3", epochs=2, batch_size=4, knn_k=2, views="plain", view_size=8)
    empty = type(good)(good.images[:0], good.labels[:0], good.classes)
    one = type(good)(good.images, good.labels * 0, good.classes)
    (folder / "a-file").write_text("x")
    call = lambda train=good, test=good, recipe=recipe, **more: pretrain(train, test, recipe, **more)
    yield from values("pretrain", call, dict(
        train=(None, good.images, empty, one), test=(None, empty), recipe=(None, {"a": 1}),
        device=("tpu", None, "cuda:99", "", 3.5), checkpoint_every=(0, -1, "x", None), workers=(-1, "x", 1.5),
        folder=(3,)))
    yield from values("pretrain", call, dict(recipe=(replace(recipe, batch_size=7),)), "batch_size")
    yield from values("pretrain", call, dict(recipe=(replace(recipe, knn_k=7),)), "knn_k")
    yield Case("pretrain into a file", partial(call, folder=folder / "a-file"), "a-file", (OSError,))
    yield from _checkpoints(folder, call, recipe)
    yield from _tasks(folder)


def _checkpoints(folder: Path, pretrain: Callable, recipe) -> Iterator[Case]:
    from temp_nce.engine.checkpoint import content_digest
    pretrain(folder=folder / "whole")
    raw = (folder / "whole" / "checkpoint.pt").read_bytes()
    whole = torch.load(folder / "whole" / "checkpoint.pt", weights_only=True)
    signed = {name: value for name, value in whole.items() if name != "digest"}
    numbers = iter(range(10**6))
    def case(name: str, content: object, pattern: str = "checkpoint: ", **change: object) -> Case:
        place = folder / f"resumed-{next(numbers)}"
        place.mkdir()
        if isinstance(content, bytes): (place / "checkpoint.pt").write_bytes(content)
        else: torch.save(content, place / "checkpoint.pt")
        return Case(f"checkpoint {name}", partial(pretrain, folder=place, resume=True, **change), pattern)
    def resigned(**change: object) -> dict:
        content = {name: value for name, value in (signed | change).items() if value is not ...}
        return content | {"digest": content_digest(content)}
    draw = random.Random(0)
    weights = whole["parts"]["encoder"]["0.weight"].numpy().tobytes()
    first = raw.index(weights)
    for number in range(20):  # of the weights: a bit of the archive's own pages may carry nothing
        at = draw.randrange(first, first + len(weights))
        bit = 1 << draw.randrange(8)
        yield case(f"bit {bit} of byte {at}", raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1:])
    yield case("cut", raw[:len(raw) // 2])
    yield case("empty", b"")
    yield case("pickle", pickled(folder))
    for name in whole: yield case(f"without {name}", {key: value for key, value in whole.items() if key != name})
    for name in signed:
        yield case(f"signed without {name}", resigned(**{name: ...}))
        for bad in (None, [], "x", 3):
            if bad != signed[name]: yield case(f"signed with {name}={bad!r}", resigned(**{name: bad}))
    for epoch, step, waited in ((99, 0, 0), (-1, 0, 0), ("x", 0, 0), (1, 0, 0), (2, -5, 0), (2, 0, -5), (2, 0, 10**9),
                                (2, 10**9, 0), (2.5, 0, 0)):
        yield case(f"signed at {epoch}, {step}, {waited}", resigned(place=dict(epoch=epoch, step=step, waited=waited)))
    early = dict(place=dict(epoch=1, step=10**6, waited=0), history=whole["history"][:1])
    yield case("signed far in an epoch", resigned(**early))
    parts = whole["parts"]
    encoder = parts["encoder"]
    name = next(iter(encoder))
    for what, change in {"shape": {"encoder": encoder | {name: torch.zeros(2)}}, "no part": {"head": None},
                         "no groups": {"optimizer": {"state": {}, "param_groups": []}},
                         "no optimizer": {"optimizer": {}}}.items():
        yield case(f"signed with {what}", resigned(parts=parts | change))
    poison = resigned(parts=parts | {"encoder": encoder | {name: encoder[name] * NAN}})
    yield case("signed with NaN weights", poison, "NaN or infinity")
    yield case("signed short states", resigned(random={key: value[:5] for key, value in whole["random"].items()}))
    yield case("signed history of texts", resigned(history=["x", "y"]))
    yield case("signed totals of texts", resigned(totals={"loss": "x"}))
    yield case("of another recipe", raw, recipe=replace(recipe, lr=0.1))
    yield case("of other data", raw, train=_images(1))


def _tasks(folder: Path) -> Iterator[Case]:
    from temp_nce.engine import Task, fit, make_optimizer, resolve_device

    class Toy(Task):
        def __init__(self):
            self.modules, self.generators = {"net": nn.Linear(2, 1)}, {}
            self.optimizer, self.fingerprint = make_optimizer(self.modules, 0.1), "x"
            self.device = torch.device("cpu")
        def batches(self, epoch): return [torch.ones(2, 2)]
        def forward(self, batch): return self.modules["net"](batch)
        def objective(self, outputs, batch): return {"loss": outputs.mean()}
        def evaluate(self): return {"accuracy": 1.0}

    def toy(**change: Callable) -> Task: return type("Changed", (Toy,), change)()
    yield from values("fit", lambda epochs=1, evaluate_every=1, **more: fit(
        Toy(), epochs, evaluate_every=evaluate_every, **more), dict(
        epochs=(-1, "x", None, 1.5, True), evaluate_every=(-1, "x"), patience=(-1, 1, "x"),
        checkpoint_every=(0, "x"), checkpoint_steps=(-1, "x"), better=("x", None), precision=("x", None),
        monitor=("nosuch", 3), folder=(3,)))
    yield Case("fit monitor without evaluations", lambda: fit(Toy(), 1, monitor="accuracy"), "monitor")
    yield from values("fit", partial(fit, epochs=1), dict(task=(None, 3, "x", Toy, nn.Linear(2, 2))))
    wrong = {"none": lambda self, o, b: None, "no dict": lambda self, o, b: o.mean(),
             "no loss": lambda self, o, b: {"los": o.mean()}, "vector": lambda self, o, b: {"loss": o[:, 0]},
             "no gradient": lambda self, o, b: {"loss": o.mean().detach()},
             "text": lambda self, o, b: {"loss": o.mean(), "x": "x"}}
    for name, objective in wrong.items():
        yield Case(f"fit objective: {name}", lambda objective=objective: fit(toy(objective=objective), 1),
                   "objective: ")
    nan = lambda self, outputs, batch: {"loss": outputs.mean() * NAN}
    yield Case("fit diverges", lambda: fit(toy(objective=nan), 1), "loss: nan")
    yield Case("fit without batches", lambda: fit(toy(batches=lambda self, epoch: []), 1), "batches: ")
    yield Case("fit without attributes", lambda: fit(toy(__init__=lambda self: None), 1), "task: .* has no")
    yield Case("fit evaluate None", lambda: fit(toy(evaluate=lambda self: None), 1, evaluate_every=1), "evaluate: ")
    yield Case("Task.batches", lambda: Task().batches(0), "must define batches", (NotImplementedError,))
    yield from values("resolve_device", resolve_device, dict(device=("tpu", "cuda:99", None, 3.5, "", [])))
    net = {"net": nn.Linear(2, 2)}
    yield from values("make_optimizer", partial(make_optimizer, net, 0.1), dict(kind=("x", None, 3)), "optimizer")
    yield from values("make_optimizer", partial(make_optimizer, net), dict(lr=(-1, "x", None, NAN)))
    yield from values("make_optimizer", partial(make_optimizer, lr=0.1), dict(
        modules=({}, {"a": nn.Identity()}, [nn.Linear(2, 2)], None)))
    yield Case("make_optimizer nosuch", partial(make_optimizer, net, 0.1, nosuch=3), "nosuch")


# --- graphs -----------------------------------------------------------------------------------------------------------

def graphs(folder: Path) -> Iterator[Case]:
    from torch_geometric.data import Data

    from temp_nce.graphs import GraphRecipe, load_graph, pretrain_graph
    from temp_nce.graphs.data import _PARTS
    from temp_nce.graphs.nodes import measure_graph, node_splits, pygcl_scores, sklearn_scores
    def planted(name: str, raw: bytes | None) -> Path:
        root = folder / f"planted-{name}-{raw is None}"
        place = root / "planetoid" / name / "raw"
        place.mkdir(parents=True, exist_ok=True)
        for piece in _PARTS if raw is not None else (): (place / f"ind.{name.lower()}.{piece}").write_bytes(raw)
        return root
    yield from values("load_graph", lambda name, root=folder: load_graph(name, root), dict(
        name=("nosuch", None, 3, "", "../x", [])))
    yield Case("load_graph root", partial(load_graph, "Cora", 3), "root")
    both = (ValueError, FileNotFoundError)
    for name in ("Cora", "CiteSeer", "PubMed"):
        yield Case(f"load_graph planted {name}", partial(load_graph, name, planted(name, pickled(folder))),
                   f"ind.{name.lower()}", both)
        yield Case(f"load_graph without files {name}", partial(load_graph, name, planted(name, None)),
                   f"ind.{name.lower()}", both)
    yield from values("GraphRecipe", GraphRecipe, dict(
        temperature=("x", 0, None), hidden=(0, -1, "x", 1.5, None), inner=(-1, "x"), layers=(0, "x"),
        activation=("x", None), projection=(0, "x"), drop_edge_0=(-1, 1, "x", NAN), drop_edge_1=(1.5,),
        drop_feature_0=(1,), drop_feature_1=(-0.1,), epochs=(0, "x", True), lr=(-1, "x", INF), weight_decay=(-1,),
        seed=(-1, "x", 1.5, 2**70)))
    graph, recipe = load_graph("blocks"), GraphRecipe(epochs=1)
    x, edges = graph.x, graph.edge_index
    changed = lambda x=x, edge_index=edges: pretrain_graph(Data(x=x, edge_index=edge_index), recipe)
    yield from values("pretrain_graph", changed, dict(
        x=(None, x.long(), x[0], x * NAN, x[:1], x.to_sparse(), x[:, :0], "x", [[1.0]]),
        edge_index=(None, edges.float(), edges[0], edges.T, edges + 1000, edges - 1, "x")), "data.{}")
    whole = lambda data=graph, recipe=recipe, device="cpu": pretrain_graph(data, recipe, device=device)
    yield from values("pretrain_graph", whole, dict(
        data=(None, 3, "x", x), recipe=(None, {"a": 1}), device=("tpu", "cuda:99", None)))
    yield from values("node_splits", partial(node_splits, seed=0), dict(nodes=(9, -1, "x", None, 1.5)))
    z, y = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    for call in (lambda z=z, y=y: measure_graph(z, y), lambda z=z, y=y: pygcl_scores(z, y, node_splits(30, 0)),
                 lambda z=z, y=y: sklearn_scores(z, y, node_splits(30, 0))):
        yield from values("scores", call, dict(z=(None, z * NAN, z[0], z.long(), "x"),
                                               y=(None, y.float(), y[:3], y - 1, y * 0, "x")), "{}: |y: shape")


# --- files and the lab ------------------------------------------------------------------------------------------------

def files(folder: Path) -> Iterator[Case]:
    from temp_nce import files, sources
    def put(name: str, raw: bytes) -> Path:
        (folder / name).write_bytes(raw)
        return folder / name
    yield Case("write_text over a folder", partial(files.write_text, folder, "x"), str(folder), (OSError,))
    for bad in (NAN, object(), {1: {2}}): yield Case(f"write_json {type(bad).__name__}", partial(
        files.write_json, folder / "n.json", bad), "JSON")
    for name, raw in {"brace": b"{", "text": b"\xff", "deep": b"[" * 99999, "digits": b"9" * 9999}.items():
        yield Case(f"read_json {name}", partial(files.read_json, put(f"{name}.json", raw)), f"{name}.json")
    yield Case("run_hash", partial(files.run_hash, {"a": object()}), "JSON")
    call = lambda url="https://127.0.0.1:1/x", sha256="0" * 64: sources.download(url, sha256, folder / "came")
    yield from values("download", call, dict(
        url=("http://example.com/x", "ftp://x/y", "file:///etc/passwd", "x", "", "javascript:1", "https://", None, 3,
             "http://127.0.0.1@elsewhere/x", b"https://x"),
        sha256=("", "x", "0" * 63, "A" * 64, None, 3, b"0" * 64)))
    for name, path in _archives(folder).items():
        yield Case(f"unpack {name}", partial(sources.unpack, path, folder / "unpacked"), path.name)
    for name, raw in {"system": b"cos\nsystem\n.", "junk": b"junk", "empty": b"", "cut": b"(",
                      "eval": b"c__builtin__\neval\n.", "stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93."}.items():
        yield Case(f"check_pickle {name}", partial(sources.check_pickle, put(f"{name}.pkl", raw), ["a b"]),
                   f"{name}.pkl")
    yield Case("check_pickle allowed", partial(sources.check_pickle, folder / "cut.pkl", "a b"), "allowed")


def _archives(folder: Path) -> dict[str, Path]:
    "Archives that are none, or that lead elsewhere."
    def tarred(name: str, member: str, **more: object) -> Path:
        with tarfile.open(folder / name, "w") as file:
            info = tarfile.TarInfo(member)
            for key, value in more.items(): setattr(info, key, value)
            file.addfile(info, io.BytesIO())
        return folder / name
    def zipped(name: str, member: str) -> Path:
        with zipfile.ZipFile(folder / name, "w") as file: file.writestr(member, "x")
        return folder / name
    for name, raw in (("junk.tar", b"junk" * 99), ("empty.tar", b"")): (folder / name).write_bytes(raw)
    return {"junk": folder / "junk.tar", "empty": folder / "empty.tar", "up": tarred("up.tar", "../x"),
            "link": tarred("link.tar", "l", type=tarfile.SYMTYPE, linkname="/etc"),
            "device": tarred("device.tar", "d", type=tarfile.CHRTYPE), "zip up": zipped("up.zip", "../x"),
            "zip absolute": zipped("absolute.zip", f"{folder}/EXECUTED")}


def lab(folder: Path) -> Iterator[Case]:
    from temp_nce.lab.batch import execute, repeat
    from temp_nce.lab.share import share
    from temp_nce.lab.ledger import Ledger, find_row
    from temp_nce.lab.results import results
    from temp_nce.lab.run import finish_run, open_run, plan, read_notebook
    from temp_nce.lab.spec import load_spec
    (folder / "lab").mkdir()
    home = make_lab(folder / "lab")
    (folder / "plain").write_text("x")
    spec = load_spec(home / "toy.yaml")
    runs, out = plan(spec, "smoke"), io.StringIO()
    yield from values("load_spec", load_spec, dict(
        name=(None, 3, "nosuch", "", [], "../x", "\0", "nosuch.yaml", "a" * 9999, home)), "spec|FILE")
    yield from values("plan", lambda spec=spec, scale="smoke": plan(spec, scale), dict(
        spec=(None, 3, "toy"), scale=("nosuch", None, 3, "", [])))
    sets = ({"nosuch": [1]}, {"steps": ["x"]}, {"steps": [None]}, {"steps": []}, {"steps": 3}, {"seed": "x"}, 3, "x",
            {3: [1]}, {"steps": [NAN]}, {"device": ["x"]}, {"temperature": [[1]]}, {"fast": [3]}, {"seed": [True]},
            {"lr": [INF]}, {"lr": ["nan"]}, {"lr": [10**400]}, {"run_dir": ["/etc"]})
    yield from values("plan", partial(plan, spec, "smoke"), dict(overrides=sets), "--set|overrides")
    call = lambda runs=runs, device="cpu", **more: execute(runs, device=device, home=home, out=out, **more)
    yield from values("execute", call, dict(
        runs=([], None, 3, ["x"], [None]), device=("tpu", "", None, 3, "cuda:x", "cuda:-1"),
        jobs=(0, -1, "x", 1.5, True), per_gpu=(0, -1, "x", 1.5), on=("x", 3, []), ask=({"a": 1},)), "{}|per-gpu")
    for bad in ("", "x", "../..", "0000", None, 3, "0" * 13, "ABCD", "\n0000"):
        for name, each in (("repeat", partial(repeat, out=out)), ("share", share), ("find_row", find_row)):
            yield Case(f"{name} {bad!r}", partial(each, bad, home=home), "id: ")
    yield from values("Ledger", partial(Ledger, home=home), dict(spec=(None, 3, "../x", "a/b", "", "x\n", "..", "a\0")))
    row = make_row(1)
    rows = (None, 3, [], {}, row | {"id": "../x"}, row | {"spec": "other"}, row | {"metrics": {"a": NAN}},
            row | {"parameters": {"a": object()}}, {key: value for key, value in row.items() if key != "metrics"})
    yield from values("Ledger.put", Ledger("toy", home).put, dict(row=rows))
    yield from values("results", lambda spec=(spec,), scale=None: results(spec, scale, home), dict(
        scale=("nosuch", 3, ""), spec=(3, ["nosuch"], [3], "nosuch")))
    yield Case("results of nothing", partial(results, [], home=home), "spec")
    yield from values("finish_run", partial(finish_run, folder / "finished"), dict(
        metrics=({}, None, 3, {"a": "x"}, {"a": None}, {"a": [1]}, {"a": 1j}, {"a": torch.zeros(2)})))
    yield from values("finish_run", partial(finish_run, metrics={"a": 1}), dict(run_dir=(3, None)))
    yield from values("open_run", open_run, dict(run_dir=(3, ["x"])))
    yield Case("open_run on a file", partial(open_run, folder / "plain"), "plain", (OSError,))
    yield from values("read_notebook", read_notebook, dict(notebook=(None, 3, folder, "nosuch.ipynb",
                                                                     folder / "plain")), "notebook|plain")


AREAS = {"losses": losses, "temperatures": temperatures, "metrics": metrics, "images": images, "training": training,
         "graphs": graphs, "files": files, "lab": lab}
