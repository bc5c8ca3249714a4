"""Data sets: every way a file can be wrong, cut-off downloads, the decoded cache, and the real sets where they are."""
import hashlib
import http.server
import os
import pickle
import shutil
import signal
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets, transforms

from temp_nce.images import data, decode
from temp_nce.images.data import DATASETS, Images, load_images, long_tail
from temp_nce.metrics import knn_accuracy
from temp_nce.sources import Archive, sha256


@pytest.fixture(autouse=True)
def no_shared_folder(monkeypatch, request):
    if "data" not in request.keywords: monkeypatch.delenv("TEMP_NCE_DATA", raising=False)


@pytest.fixture
def server(tmp_path):
    "A web server on this machine: its folder and its address."
    (tmp_path / "server").mkdir()
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "server")) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield tmp_path / "server", f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def made_up(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows = torch.arange(len(labels))
    pixels = torch.stack([rows % 256, rows // 256, rows * 0], 1).to(torch.uint8)[:, :, None, None]  # the row number
    return Images(pixels, labels, tuple(map(str, range(len(counts)))))


def numbers(images): return (images.images[:, 0, 0, 0].long() + 256 * images.images[:, 1, 0, 0].long()).tolist()


# ---- Images

def test_indexing_keeps_rows_and_classes_together():
    images = made_up([3, 4])
    assert numbers(images[2:5]) == [2, 3, 4] and images[2:5].labels.tolist() == [0, 1, 1]
    assert numbers(images[[6, 0]]) == [6, 0] and numbers(images[torch.tensor([1, 1])]) == [1, 1]
    assert numbers(images[images.labels == 1]) == [3, 4, 5, 6] and images[[0]].classes == ("0", "1")
    assert len(images.to("meta")) == 7 and images.to("meta").images.device.type == "meta"
    with pytest.raises(TypeError, match="rows: a 0-d index"): images[3]
    with pytest.raises(IndexError): images[[7]]


@pytest.mark.parametrize("pixels, labels, error", [
    (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), TypeError),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32), TypeError),
    (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), ValueError),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ValueError)])
def test_parts_that_do_not_fit_are_refused(pixels, labels, error):
    with pytest.raises(error, match="images, labels"): Images(pixels, labels, ("a",))


@pytest.mark.parametrize("labels, came", [([0, -1], "-1"), ([0, 2], "2"), ([5, -3], "-3")])
def test_labels_without_a_class_are_refused(labels, came):
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"labels: {came} came; give 0 to 1, for there are 2 classes"):
        Images(pixels, torch.tensor(labels), ("a", "b"))
    assert len(Images(pixels[:0], torch.zeros(0, dtype=torch.int64), ("a",))) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**31), st.data())
def test_subsets_are_balanced_nested_and_repeatable(counts, seed, draw):
    images = made_up(counts)
    n = draw.draw(st.integers(1, len(images)))
    subset = images.subset(n, seed)
    rows, found = numbers(subset), subset.labels.bincount(minlength=len(counts)).tolist()
    assert len(set(rows)) == n and rows == sorted(rows) == numbers(images.subset(n, seed))
    assert set(numbers(images.subset(max(1, n // 2), seed))) <= set(rows)
    short = [c for c, f in zip(counts, found) if f < c]  # classes that were not used up
    assert all(f >= max(found) - 1 for c, f in zip(counts, found) if f < c) or not short
    assert subset.labels.tolist() == images.labels[rows].tolist()


def test_subset_depends_on_the_seed_and_refuses_impossible_sizes():
    images = made_up([50, 50])
    assert numbers(images.subset(20, 0)) != numbers(images.subset(20, 1))
    for n in (0, 101, -1):
        with pytest.raises(ValueError, match=f"n: {n} came; .* at least 1 and at most 100"): images.subset(n)


@pytest.mark.parametrize("classes, largest, ratio, total", [
    (10, 5000, 0.01, 12_406), (10, 5000, 0.1, 20_431), (100, 500, 0.01, 10_847), (100, 500, 0.1, 19_573),
    (10, 5000, 1, 50_000), (1, 5, 0.5, 5)])
def test_long_tail_has_the_published_sizes(classes, largest, ratio, total):
    pixels, labels = torch.zeros(1, dtype=torch.uint8), torch.arange(classes).repeat(largest)
    images = Images(pixels.expand(len(labels), 3, 1, 1), labels, ("x",) * classes)
    sizes = long_tail(images, ratio).labels.bincount()
    assert sizes.sum() == total and sizes[0] == largest and (sizes.diff() <= 0).all()
    if classes > 1: assert sizes[-1] == int(largest * ratio)


def test_long_tail_is_seeded_and_refuses_ratios():
    images = made_up([100, 100, 120])
    tail = long_tail(images, 0.1, seed=3)
    assert tail.labels.bincount().tolist() == [100, 31, 10]
    assert numbers(tail) == numbers(long_tail(images, 0.1, seed=3)) != numbers(long_tail(images, 0.1, seed=4))
    for ratio in (0, 1.5, -1): pytest.raises(ValueError, long_tail, images, ratio).match("ratio")
    with pytest.raises(ValueError, match="leaves no image"): long_tail(images, 0.001)


# ---- digits

def test_digits_are_split_once_and_for_all():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1352, 445) and train.images.shape[1:] == (3, 32, 32)
    assert torch.equal(train.images[:, 0], train.images[:, 2]) and train.images.max() == 255
    assert train.images.min() == 0
    assert train.labels.bincount().tolist() == [134, 137, 133, 138, 136, 137, 136, 135, 131, 135]
    small = [load_images("digits", split=split, size=8).images for split in ("train", "test")]
    everything = torch.cat(small)[:, 0].flatten(1).long()
    original = (torch.tensor(load_digits().images.reshape(-1, 64)) * 255 / 16).round().long()
    assert sorted(everything.tolist()) == sorted(original.tolist())  # size 8 gives scikit-learn's pixels, each once
    assert load_images("digits", size=16).images.shape == (1352, 3, 16, 16)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [None, 8, 11, 24])
def test_moved_digits_are_the_digits_somewhere_on_black(split, size):
    moved, plain = load_images("moved-digits", split=split, size=size), load_images("digits", split=split, size=8)
    side = size or 16
    assert moved.images.shape == (len(plain), 3, side, side) and torch.equal(moved.labels, plain.labels)
    assert moved.classes == plain.classes and all(torch.equal(moved.images[:, 0], moved.images[:, c]) for c in (1, 2))
    assert torch.equal(moved.images.sum((2, 3)), plain.images.sum((2, 3)))  # nothing but the digit
    blocks = moved.images[:, 0].unfold(1, 8, 1).unfold(2, 8, 1)  # (N, side − 7, side − 7, 8, 8)
    found = (blocks == plain.images[:, 0, None, None]).flatten(3).all(3)
    assert found.flatten(1).any(1).all()  # each is there, and every row and column of places is used
    assert found.any(0).any(0).all() and found.any(0).any(1).all()


def test_moved_digits_are_the_same_everywhere():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    digest = lambda **k: hashlib.sha256(load_images("moved-digits", **k).images.numpy().tobytes()).hexdigest()[:16]
    assert [digest(), digest(split="test"), digest(size=24)] == [
        "f637e4c408eaed5a", "966f404120d4e339", "5a43bd45ef482f6e"]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_larger_canvas_weakens_the_pixels():
    def pixels(size):
        bank, queries = (load_images("moved-digits", split=split, size=size) for split in ("train", "test"))
        flat = [part.images[:, 0].flatten(1).float() for part in (bank, queries)]
        return knn_accuracy(flat[0], bank.labels, flat[1], queries.labels, k=20)
    small, middle, large = pixels(8), pixels(16), pixels(24)
    assert small > 0.96 and 0.5 < middle < 0.7 and large < 0.45


# ---- CIFAR, binary release

def record_file(path, labels, label_bytes=1, seed=0):
    rng = np.random.default_rng(seed)
    records = rng.integers(0, 256, (len(labels), label_bytes + 3072), dtype=np.uint8)
    records[:, label_bytes - 1] = labels
    path.write_bytes(records.tobytes())
    return records, hashlib.sha256(records.tobytes()).hexdigest()


@pytest.fixture
def tiny_binary(tmp_path, monkeypatch):
    "Both CIFARs in the binary layout with five records a file; the table of published sums is that of these files."
    made, table = {}, {}
    for name, folder in (("cifar10", tmp_path / "cifar-10-batches-bin"), ("cifar100", tmp_path / "cifar-100-binary")):
        release = decode.CIFAR_BINARY[name]
        folder.mkdir()
        (folder / release["names"]).write_text("\n".join(f"class{i}" for i in range(int(name[5:]))) + "\n\n")
        table[name] = dict(release, records={"train": 5, "test": 5}, train={}, test={})
        for split in ("train", "test"):
            for k, file in enumerate(release[split]):
                skip = release["label_bytes"]
                records, table[name][split][file] = record_file(folder / file, [0, 9, 3, 3, k], skip, k)
                made[name, file] = torch.from_numpy(records[:, skip:].copy())
    monkeypatch.setattr(decode, "CIFAR_BINARY", table)
    return tmp_path, made


def test_binary_release_is_read_record_by_record(tiny_binary):
    root, made = tiny_binary
    train, fine = load_images("cifar10", root), load_images("cifar100", root)
    assert train.labels.tolist() == [x for k in range(5) for x in (0, 9, 3, 3, k)] and train.classes[9] == "class9"
    assert torch.equal(train.images[5:10].flatten(1), made["cifar10", "data_batch_2.bin"])
    assert fine.labels.tolist() == [0, 9, 3, 3, 0]
    assert torch.equal(fine.images.flatten(1), made["cifar100", "train.bin"])
    assert len(load_images("cifar10", root, split="test")) == 5 and len(fine.classes) == 100
    assert load_images("cifar10", root, size=16).images.shape == (25, 3, 16, 16)


@pytest.mark.parametrize("damage, says", [
    (lambda raw: raw[:2 * 3073], "6,146 bytes instead of 5 records of 3,073"), (lambda raw: raw[:-1], "bytes instead"),
    (lambda raw: raw * 2, "bytes instead"), (lambda raw: b"", "0 bytes instead"),
    (lambda raw: raw[:3073] + b"\xc8" + raw[3074:], "record 1 has the label 200 of 10 classes"),
    (lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:], "SHA-256 .* instead of")])
def test_a_damaged_binary_file_is_named(tiny_binary, damage, says):
    root, _ = tiny_binary
    path = root / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"data_batch_3.bin: .*{says}.*https://www.cs.toronto.edu") as caught:
        load_images("cifar10", root)
    assert "\n" not in str(caught.value)
    assert len(load_images("cifar10", root, split="test")) == 5  # the other part is whole


@pytest.mark.parametrize("file", ["data_batch_5.bin", "batches.meta.txt"])
def test_a_missing_binary_file_is_named(tiny_binary, file):
    root, _ = tiny_binary
    (root / "cifar-10-batches-bin" / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file}: missing .*https://"): load_images("cifar10", root)


# ---- CIFAR, downloaded from a server of ours

@pytest.fixture
def published(tiny_binary, server, monkeypatch):
    "A folder to download into, and the small binary release as an archive on a server, in the table with its sum."
    (made, _), (source, address) = tiny_binary, server
    path = source / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar: tar.add(made / "cifar-10-batches-bin", "cifar-10-batches-bin")
    fetch = Archive(f"{address}/{path.name}", sha256(path))
    monkeypatch.setitem(data.PUBLISHED, "cifar10", replace(data.PUBLISHED["cifar10"], fetch=fetch))
    return made / "root", path


def test_download_puts_the_whole_set_in_place(published, tiny_binary):
    root, archive = published
    train = load_images("cifar10", root)
    assert len(train) == 25 and train.labels[:5].tolist() == [0, 9, 3, 3, 0]
    assert torch.equal(train.images[5:10].flatten(1), tiny_binary[1]["cifar10", "data_batch_2.bin"])
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]  # no archive, no temporary folder
    archive.unlink()
    assert len(load_images("cifar10", root, split="test")) == 5  # from the folder now


@pytest.mark.parametrize("damage", [lambda raw: raw[:-500], lambda raw: raw[:50] + b"?" + raw[51:], lambda raw: b""])
def test_a_cut_off_or_changed_archive_leaves_nothing(published, damage):
    root, archive = published
    archive.write_bytes(damage(archive.read_bytes()))
    says = r"cifar10: no folder cifar-10-batches-bin or .* in .*root, and the download failed .*SHA-256.*TEMP_NCE_DATA"
    with pytest.raises(FileNotFoundError, match=says) as caught: load_images("cifar10", root)
    assert "\n" not in str(caught.value) and not any(root.iterdir())


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_an_interrupted_download_is_not_taken_for_whole(published, monkeypatch, how):
    root, _ = published
    def half(part):
        (part / "cifar-10-batches-bin").mkdir()
        (part / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"half")
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt
    cut = replace(data.PUBLISHED["cifar10"], fetch=half)
    if how == "interrupt":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setitem(data.PUBLISHED, "cifar10", cut)
            load_images("cifar10", root)
        assert not any(root.iterdir())
    else:
        child = os.fork()
        if child == 0:
            data.PUBLISHED["cifar10"] = cut
            try: load_images("cifar10", root)
            finally: os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert [path.name[:10] for path in root.iterdir()] == [".download-"]
    assert len(load_images("cifar10", root)) == 25


def test_root_comes_first_then_the_shared_folder_then_the_network(published, tiny_binary, monkeypatch):
    (root, _), (shared, _) = published, tiny_binary
    monkeypatch.setenv("TEMP_NCE_DATA", str(shared))
    before = sorted(shared.rglob("*"))
    assert len(load_images("cifar10", root)) == 25 and not root.exists() and sorted(shared.rglob("*")) == before
    (shared / "cifar-10-batches-bin").rename(shared / "away")
    assert len(load_images("cifar10", root)) == 25 and (root / "cifar-10-batches-bin").is_dir()  # downloaded
    (shared / "away").rename(shared / "cifar-10-batches-bin")
    (shared / "cifar-10-batches-bin" / "data_batch_1.bin").unlink()
    assert len(load_images("cifar10", root)) == 25  # root first


def test_offline_is_one_clear_error(tmp_path, monkeypatch):
    fetch = Archive("http://127.0.0.1:9/cifar-100-binary.tar.gz", "0" * 64)
    monkeypatch.setitem(data.PUBLISHED, "cifar100", replace(data.PUBLISHED["cifar100"], fetch=fetch))
    monkeypatch.setenv("TEMP_NCE_DATA", str(tmp_path / "shared"))
    says = r"cifar100: no folder cifar-100-binary or .* in .*root nor .*shared, and the download failed \(URLError"
    with pytest.raises(FileNotFoundError, match=says) as caught: load_images("cifar100", tmp_path / "root")
    assert "\n" not in str(caught.value) and not any((tmp_path / "root").iterdir())


def test_what_is_published_comes_over_https_with_a_sum_and_holds_no_pickle():
    for name, published in data.PUBLISHED.items():
        assert published.fetch.url.startswith("https://") and len(bytes.fromhex(published.fetch.sha256)) == 32
        assert "python" not in published.fetch.url and next(iter(published.readers))[-3:] != "-py"
    sums = [sum_ for release in decode.CIFAR_BINARY.values() for part in ("train", "test")
            for sum_ in release[part].values()]
    assert len(sums) == len(set(sums)) == 8 and all(len(bytes.fromhex(sum_)) == 32 for sum_ in sums)


# ---- CIFAR, pickled release, read where it lies by torchvision

@pytest.fixture
def tiny_pickles(tmp_path, monkeypatch):
    "A small folder in the layout of the Python release; torchvision's sums are those of its files."
    rng, folder = np.random.default_rng(0), tmp_path / "pickled" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batch = lambda labels: {"data": rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8), "labels": labels}
    members = {f"data_batch_{k}": batch([k - 1, 5, 6, 7]) for k in range(1, 6)}
    members |= {"test_batch": batch([1, 2, 3]), "batches.meta": {"label_names": list("abcdefghij")}}
    for name, content in members.items(): (folder / name).write_bytes(pickle.dumps(content))
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in members}
    cifar = partial(monkeypatch.setattr, datasets.CIFAR10)
    cifar("train_list", [[name, sums[name]] for name in members if name.startswith("data_batch")])
    cifar("test_list", [["test_batch", sums["test_batch"]]])
    cifar("meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    return folder.parent, members


def test_the_pickled_release_is_read_where_it_lies(tiny_pickles):
    root, members = tiny_pickles
    train = load_images("cifar10", root)
    assert len(train) == 20 and train.labels[:8].tolist() == [0, 5, 6, 7, 1, 5, 6, 7]
    assert train.classes == tuple("abcdefghij") and len(load_images("cifar10", root, split="test")) == 3
    assert torch.equal(train.images[5].flatten(), torch.from_numpy(members["data_batch_2"]["data"][1]))


def test_of_two_releases_in_one_place_the_binary_one_is_read(tiny_pickles, tiny_binary):
    root, _ = tiny_pickles
    shutil.copytree(tiny_binary[0] / "cifar-10-batches-bin", root / "cifar-10-batches-bin")
    assert len(load_images("cifar10", root)) == 25


@pytest.mark.parametrize("file", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_damaged_or_missing_pickle_is_named_and_not_opened(tiny_pickles, file):
    root, _ = tiny_pickles
    path = root / "cifar-10-batches-py" / file
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(root / "owned").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=f"{file}: MD5 is not .*https://"): load_images("cifar10", root)
    assert not (root / "owned").exists()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: missing"): load_images("cifar10", root)


# ---- folders of image files

def save(path, size=(20, 16), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
    smooth.convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for split, n in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for k in range(n): save(tmp_path / "own" / split / name / f"{k}.png", seed=10 * label + k)
    return tmp_path / "own"


def test_a_folder_of_class_folders(folder, tmp_path):
    train = load_images(folder, tmp_path / "root")
    assert train.images.shape == (6, 3, 16, 16) and train.classes == ("ant", "bee")
    for images in (train, load_images(folder, tmp_path / "root", size=9)):
        size = images.images.shape[-1]
        centre = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
        theirs, targets = zip(*datasets.ImageFolder(folder / "train", centre))
        assert torch.equal(images.images, torch.stack(theirs)) and images.labels.tolist() == list(targets)
    assert len(load_images(folder, split="val")) == len(load_images(folder, split="test")) == 4
    assert len(load_images(folder / "train")) == 6  # a folder without parts is all there is
    assert len(load_images("own", tmp_path)) == 6  # below root
    with pytest.raises(ValueError, match="split: .* has no folder test or val"):
        load_images(folder / "train", split="test")


def test_the_first_image_sets_the_size_up_to_224(tmp_path):
    save(tmp_path / "own" / "a" / "x.png", (300, 400))
    assert load_images(tmp_path / "own").images.shape == (1, 3, 224, 224)


@pytest.mark.parametrize("mode, ending", [
    ("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "bmp"), ("RGB", "JPEG")])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, ending):
    path = save(tmp_path / "own" / "a" / f"x.{ending}", (16, 16), mode)
    theirs = transforms.PILToTensor()(Image.open(path).convert("RGB"))
    assert torch.equal(load_images(tmp_path / "own").images[0], theirs)


def test_hidden_folders_and_other_files_are_no_classes(folder):
    save(folder / "train" / ".ipynb_checkpoints" / "x.png")
    (folder / "train" / "notes.txt").write_text("")
    (folder / "train" / "ant" / "notes.txt").write_text("")
    assert load_images(folder).classes == ("ant", "bee") and len(load_images(folder)) == 6


def test_a_bad_folder_is_named(folder, tmp_path):
    (folder / "train" / "wasp").mkdir()
    with pytest.raises(ValueError, match="own.train.wasp: a class folder without an image"): load_images(folder)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare: no class folders"): load_images(tmp_path / "bare")


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"<html>gone</p>"])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_damaged_picture_is_named(tmp_path, damage, ending):
    for k in range(3): save(tmp_path / "own" / "a" / f"{k}.{ending}", (64, 64))
    broken = tmp_path / "own" / "a" / f"2.{ending}"
    broken.write_bytes(damage(broken.read_bytes()))
    with pytest.raises(ValueError, match=rf"own.a.2.{ending}: not a readable image"): load_images(tmp_path / "own")


# ---- the cache of decoded images

@pytest.fixture
def cached(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_CACHE_FROM", 0)
    return folder, tmp_path / "root", lambda **k: load_images(folder, tmp_path / "root", **k)


def no_decoding(*_): raise AssertionError("decoded again")


def test_the_second_time_maps_the_cache(cached, monkeypatch):
    folder, root, load = cached
    fresh = load()
    file, = (root / "cache").iterdir()
    assert file.name.startswith("own-16-") and file.stat().st_size == 6 * 3 * 16 * 16
    monkeypatch.setattr(decode, "_decode", no_decoding)
    again = load()
    assert torch.equal(again.images, fresh.images)
    again.images.fill_(0)  # private to this process
    assert torch.equal(load().images, fresh.images)
    with pytest.raises(AssertionError): load(size=8)


@pytest.mark.parametrize("change", ["rewrite", "add", "remove", "truncated cache"])
def test_a_changed_set_is_decoded_again(cached, change):
    folder, root, load = cached
    before = load()[[0, 1, 2, 3, 4, 5]]  # a copy, out of the mapped file
    if change == "rewrite": save(folder / "train" / "ant" / "1.png", seed=99)
    if change == "add": save(folder / "train" / "bee" / "9.png", seed=99)
    if change == "remove": (folder / "train" / "ant" / "1.png").unlink()
    if change == "truncated cache":
        path, = (root / "cache").iterdir()
        path.write_bytes(path.read_bytes()[:-1])
    after = load()
    fresh = torch.cat(list(decode._decode(decode._list_class_folders(folder / "train")[0], 16)))
    assert torch.equal(after.images, fresh)
    assert torch.equal(after.images, before.images) == (change == "truncated cache")


def test_a_cache_that_cannot_be_written_warns_and_goes_on(cached):
    folder, root, load = cached
    root.mkdir()
    (root / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the cache cannot be written"): assert len(load()) == 6
    assert (root / "cache").read_text().startswith("a file")


def test_a_failed_decoding_leaves_no_part(cached):
    folder, root, load = cached
    (folder / "train" / "bee" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match="bee.2.png"): load()
    assert not any((root / "cache").iterdir())


# ---- Imagenette and Tiny-ImageNet in their published layouts

@pytest.fixture
def tiny_trees(tmp_path, monkeypatch):
    for split, n in (("train", 2), ("val", 1)):
        for wnid in ("n01440764", "n03888257"):
            for k in range(n): save(tmp_path / "imagenette2-160" / split / wnid / f"{k}.JPEG", (213, 160))
    base = tmp_path / "tiny-imagenet-200"
    for wnid in ("n01443537", "n01629819"):
        for k in range(2): save(base / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", (64, 64), seed=k)
        (base / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for k in range(3): save(base / "val" / "images" / f"val_{k}.JPEG", (64, 64), seed=k)
    rows = [f"val_{k}.JPEG\t{wnid}\t0\t0\t62\t57\n" for k, wnid in enumerate(("n01443537", "n01629819", "n01443537"))]
    (base / "val" / "val_annotations.txt").write_text("".join(rows))
    (base / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01629819\tfire salamander\nn09\tother\n")
    counts = {"imagenette": {"train": 4, "val": 2}, "tiny-imagenet": {"train": 4, "val": 3}}
    monkeypatch.setattr(decode, "_COUNTS", counts)
    return tmp_path


def test_imagenette_and_tiny_imagenet_layouts(tiny_trees):
    train = load_images("imagenette", tiny_trees)
    assert train.images.shape == (4, 3, 160, 160) and train.classes == ("tench", "parachute")
    assert len(load_images("imagenette", tiny_trees, split="test")) == 2
    train, val = (load_images("tiny-imagenet", tiny_trees, split=split) for split in ("train", "val"))
    assert train.images.shape == (4, 3, 64, 64) and train.labels.tolist() == [0, 0, 1, 1]
    assert train.classes == val.classes == ("goldfish", "fire salamander") and val.labels.tolist() == [0, 1, 0]
    second = Image.open(tiny_trees / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG")
    assert torch.equal(val.images[1], transforms.PILToTensor()(second))


def test_validation_images_that_were_sorted_into_classes_are_read_too(tiny_trees):
    val = tiny_trees / "tiny-imagenet-200" / "val"
    for k, wnid in enumerate(("n01443537", "n01629819", "n01443537")):
        (val / wnid).mkdir(exist_ok=True)
        (val / "images" / f"val_{k}.JPEG").rename(val / wnid / f"val_{k}.JPEG")
    (val / "val_annotations.txt").unlink()
    (val / "images").rmdir()
    assert load_images("tiny-imagenet", tiny_trees, split="test").labels.tolist() == [0, 0, 1]


def test_an_incomplete_published_set_is_refused_but_loads_by_its_path(tiny_trees):
    (tiny_trees / "imagenette2-160/train/n01440764/0.JPEG").unlink()
    with pytest.raises(ValueError, match="imagenette2-160.train: 3 images instead of 4 .*https://"):
        load_images("imagenette", tiny_trees)
    assert len(load_images(tiny_trees / "imagenette2-160", tiny_trees)) == 3
    (tiny_trees / "tiny-imagenet-200/val/images/val_1.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="val_1.JPEG: missing"):
        load_images("tiny-imagenet", tiny_trees, split="val")
    (tiny_trees / "tiny-imagenet-200/words.txt").unlink()
    with pytest.raises(FileNotFoundError, match="words.txt: missing"): load_images("tiny-imagenet", tiny_trees)


def test_tiny_imagenet_is_downloaded_and_checked(tiny_trees, monkeypatch, server):
    archive = server[0] / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for file in (tiny_trees / "tiny-imagenet-200").rglob("*"): out.write(file, file.relative_to(tiny_trees))
    def publish(sum_):
        fetch = Archive(f"{server[1]}/{archive.name}", sum_)
        monkeypatch.setitem(data.PUBLISHED, "tiny-imagenet", replace(data.PUBLISHED["tiny-imagenet"], fetch=fetch))
    publish("0" * 64)
    with pytest.raises(FileNotFoundError, match="tiny-imagenet: .*the download failed .*SHA-256"):
        load_images("tiny-imagenet", tiny_trees / "new")
    assert not any((tiny_trees / "new").iterdir())  # the sum was wrong
    publish(sha256(archive))
    assert len(load_images("tiny-imagenet", tiny_trees / "new")) == 4


# ---- the call

@pytest.mark.parametrize("arguments, says", [
    (dict(name="cifr10"), "'cifr10' is neither .*digits, moved-digits, cifar10, cifar100, imagenette, tiny-imagenet"),
    (dict(name="digits", split="val"), "split: 'val' is no part of digits; give one of train, test"),
    (dict(name="cifar10", split="Train"), "split: 'Train' is no part of cifar10"),
    (dict(name="imagenette", split="all"), "give one of train, test, val"),
    (dict(name="moved-digits", split="val"), "split: 'val' is no part of moved-digits; give one of train, test"),
    (dict(name="moved-digits", size=7), "size: 7 came; give a whole number of at least 8"),
    (dict(name="digits", size=0), "size: 0"), (dict(name="moved-digits", size=0), "size: 0"),
    (dict(name="/nowhere/at/all"), "'/nowhere/at/all' is neither")])
def test_bad_arguments_are_named_before_anything_is_touched(tmp_path, arguments, says):
    with pytest.raises(ValueError, match=says): load_images(**arguments, root=tmp_path / "root")
    assert not (tmp_path / "root").exists() and DATASETS[:2] == ("digits", "moved-digits")


# ---- the real sets, where they are

def real(*folders):
    for place in (os.environ.get("TEMP_NCE_DATA"), Path(__file__).parent.parent / "data"):
        for folder in folders:
            if place and (Path(place) / folder).is_dir(): return Path(place)
    pytest.skip(f"no {' or '.join(folders)} in data/ or in $TEMP_NCE_DATA")


@pytest.mark.data
def test_real_cifar10(tmp_path):
    place = real("cifar-10-batches-bin", "cifar-10-batches-py")
    train, test = load_images("cifar10", place), load_images("cifar10", place, split="test")
    assert train.labels.bincount().tolist() == [5000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    assert train.classes[0] == "airplane" and train.classes[9] == "truck"
    pixels = train.images[::5].float() / 255
    from temp_nce.images.augment import NORMALIZATION
    mean, std = NORMALIZATION["cifar10"]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(mean), atol=3e-3, rtol=0)
    within = pixels.std((2, 3)).mean(0)
    torch.testing.assert_close(within, torch.tensor(std), atol=3e-3, rtol=0)
    assert (pixels.std((0, 2, 3)) > 0.24).all()  # the deviation of the pixels


@pytest.mark.data
def test_real_cifar10_with_one_file_cut_in_half(tmp_path):
    whole = real("cifar-10-batches-bin") / "cifar-10-batches-bin"
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for file in whole.iterdir(): (tmp_path / "cifar-10-batches-bin" / file.name).symlink_to(file.absolute())
    assert len(load_images("cifar10", tmp_path)) == 50_000
    cut = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    cut.unlink()
    cut.write_bytes((whole / "data_batch_3.bin").read_bytes()[:5_000 * 3073])
    with pytest.raises(ValueError, match="data_batch_3.bin: 15,365,000 bytes instead of 10,000 records"):
        load_images("cifar10", tmp_path)


@pytest.mark.data
def test_real_imagenette(tmp_path, monkeypatch):
    place = real("imagenette2-160")
    before = sorted(path.name for path in place.iterdir())
    def some(files, base, size, cache, label):  # every hundredth picture is enough here
        return torch.cat(list(decode._decode(files[::100], size))).repeat(100, 1, 1, 1)[:len(files)]
    monkeypatch.setattr(decode, "_decode_cached", some)
    monkeypatch.setenv("TEMP_NCE_DATA", str(place))
    train, val = (load_images("imagenette", tmp_path, split=split) for split in ("train", "val"))
    assert train.images.shape == (9469, 3, 160, 160) and val.images.shape == (3925, 3, 160, 160)
    assert train.classes[3] == val.classes[3] == "chain saw"
    assert train.labels.bincount().tolist() == [963, 955, 993, 858, 941, 956, 961, 931, 951, 960]
    assert sorted(path.name for path in place.iterdir()) == before
