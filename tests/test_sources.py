"""Published files: places, downloads that go wrong, archives that escape, pickles that would run code."""
import http.server
import io
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import OrderedDict, defaultdict
from hashlib import sha256 as digest
from pathlib import Path

import pytest

from temp_nce import sources
from temp_nce.sources import Archive, check_pickle, download, find_or_download, places, sha256, unpack

TEXT = b"what was published\n" * 1000
SUM = digest(TEXT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    "Each path is one way in which a server behaves."
    def log_message(self, *_): pass

    def do_GET(self):
        if self.path == "/silent": return time.sleep(1.5)
        if self.path == "/missing": return self.send_error(404)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            return self.end_headers()
        self.send_response(200)
        if self.path != "/unknown-length": self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT[:5000] if self.path == "/cut" else TEXT)


@pytest.fixture(scope="module")
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


# ---- places

def test_places_in_order_and_without_repetition(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMP_NCE_DATA", str(tmp_path / "shared"))
    assert places(tmp_path) == [tmp_path, tmp_path / "shared"]
    assert places(tmp_path / "x" / ".." / "shared") == [tmp_path / "x" / ".." / "shared"]
    monkeypatch.setenv("TEMP_NCE_DATA", "")
    assert places("data") == [Path("data")] and places("~/data") == [Path.home() / "data"]


# ---- download

@pytest.mark.parametrize("path", ["/plain", "/unknown-length", "/to//plain"])
def test_a_right_file_is_brought_whole(address, tmp_path, path):
    download(address + path, SUM, tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == TEXT and sha256(tmp_path / "new" / "file") == SUM
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["file"]


@pytest.mark.parametrize("path, sum_, error, says", [
    ("/plain", "0" * 64, ValueError, f"19,000 bytes came, with SHA-256 {SUM} instead of 0000"),
    ("/cut", SUM, ValueError, "5,000 bytes of 19,000 came, with SHA-256"),
    ("/missing", SUM, OSError, "404"), ("/silent", SUM, OSError, "timed out"),
    ("/plain", "", ValueError, "sha256: '' came; give 64 digits"),
    ("/plain", SUM.upper(), ValueError, "give 64 digits"),
    ("/to/http://example.org/x", SUM, ValueError, "'http://example.org/x' is not secure"),
    ("/to/ftp://127.0.0.1/x", SUM, ValueError, "is not secure")])
def test_a_wrong_file_is_refused_and_leaves_the_old_one(address, tmp_path, path, sum_, error, says):
    (tmp_path / "file").write_text("old")
    with pytest.raises(error, match=says) as caught: download(address + path, sum_, tmp_path / "file", timeout=0.3)
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("url", ["http://example.org/x", "ftp://example.org/x", "file:///etc/passwd", "x", "",
                                 "http://127.0.0.1.example.org", "http://localhost@example.org/x", "HTTP://10.0.0.1"])
def test_only_secure_addresses_are_opened(url, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "build_opener", lambda *_: pytest.fail("a connection was tried"))
    with pytest.raises(ValueError, match="is not secure; give an address that begins with https"):
        download(url, SUM, tmp_path / "x")


def test_the_process_keeps_its_own_timeout(address, tmp_path):
    before = socket.getdefaulttimeout()
    try:
        for own in (None, 77.0):
            socket.setdefaulttimeout(own)
            find_or_download("set", ["set"], lambda part: (
                download(f"{address}/plain", SUM, part / "set" / "x"),
                pytest.fail("changed") if socket.getdefaulttimeout() != own else None), address, tmp_path / str(own))
            assert socket.getdefaulttimeout() == own
    finally: socket.setdefaulttimeout(before)
    assert "setdefaulttimeout" not in Path(sources.__file__).read_text()


def test_large_files_show_progress_and_small_ones_do_not(address, tmp_path, capsys):
    download(f"{address}/plain", SUM, tmp_path / "file")
    assert capsys.readouterr() == ("", "")
    download(f"{address}/unknown-length", SUM, tmp_path / "file")
    out, err = capsys.readouterr()
    assert "file: " in out and "19.0k" in out and not err


# ---- archives

def tar_with(path, *entries):
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, target in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            entry.size = 2 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(b"hi"))
    return path


@pytest.mark.parametrize("entries", [
    [("../out", tarfile.REGTYPE, "")], [("a/../../out", tarfile.REGTYPE, "")],
    [("link", tarfile.SYMTYPE, "../..")], [("link", tarfile.SYMTYPE, ".."), ("link/out", tarfile.REGTYPE, "")],
    [("hard", tarfile.LNKTYPE, "../secret")], [("device", tarfile.CHRTYPE, "")]])
def test_a_tar_that_leads_out_is_refused(entries, tmp_path):
    (tmp_path / "secret").write_text("secret")
    archive = tar_with(tmp_path / "bad.tar.gz", *entries)
    with pytest.raises(ValueError, match="bad.tar.gz: cannot be unpacked") as caught: unpack(archive, tmp_path / "in")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/tmp/temp-nce-out"])
def test_a_zip_that_leads_out_is_refused_before_anything_is_written(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as out:
        out.writestr("good", "hi")
        out.writestr(name, "hi")
    with pytest.raises(ValueError, match="bad.zip: cannot be unpacked .*leads out of the folder"):
        unpack(tmp_path / "bad.zip", tmp_path / "in")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.zip"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:len(raw) // 2], lambda raw: b"", lambda raw: b"<html>gone</p>"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_damaged_archive_is_named(kind, damage, tmp_path):
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as out: out.writestr("set/x", os.urandom(9000))
    else: tar_with(path, *[(f"set/{k}", tarfile.REGTYPE, "") for k in range(500)])
    unpack(path, tmp_path / "whole")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"set.{kind}: cannot be unpacked") as caught: unpack(path, tmp_path / "part")
    assert "\n" not in str(caught.value)


# ---- found, or brought

def test_found_in_root_then_shared_then_brought(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMP_NCE_DATA", str(tmp_path / "shared"))
    brought = lambda part: (part / "deep" / "two").mkdir(parents=True)
    find = lambda: find_or_download("set", ["one", "deep/two"], brought, "https://x.org", tmp_path / "root")
    (tmp_path / "shared" / "one").mkdir(parents=True)
    assert find() == tmp_path / "shared" / "one" and not (tmp_path / "root").exists()
    (tmp_path / "shared" / "one").rmdir()
    assert find() == find() == tmp_path / "root" / "deep" / "two"
    assert [each.name for each in (tmp_path / "root").iterdir()] == ["deep"]
    assert not any((tmp_path / "shared").iterdir())


def test_what_came_without_the_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="set: no folder one .*the download failed .*holds no such folder"):
        find_or_download("set", ["one"], lambda part: (part / "other").mkdir(), "https://x.org", tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_archive_brings_its_content_and_not_itself(address, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "download", lambda url, sum_, path: tar_with(path, ("set/x", tarfile.REGTYPE, "")))
    Archive("https://x.org/a/set.tar.gz?download=1", SUM)(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["set"]


# ---- pickles

class Planted:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


OWN = ("collections OrderedDict", "collections defaultdict", "__builtin__ list")


@pytest.mark.parametrize("content", [
    [1, 2.5, "x", None, {"a": (1, b"raw")}], OrderedDict(a=1), defaultdict(list, {1: [2]})])
def test_plain_data_and_allowed_names_pass(content, tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(content, protocol=2))
    check_pickle(tmp_path / "x", (*OWN, "_codecs encode"))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, {"deep": (2, x)}], lambda x: OrderedDict(a=x)])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_planted_command_is_refused_at_every_protocol_and_not_run(protocol, wrap, tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(wrap(Planted(tmp_path / "owned")), protocol=protocol))
    with pytest.raises(ValueError, match="x: not opened, .*(imports 'posix system'|STACK_GLOBAL)") as caught:
        check_pickle(tmp_path / "x", (*OWN, "copy_reg _reconstructor", "__builtin__ object"))
    assert "\n" not in str(caught.value) and not (tmp_path / "owned").exists()


@pytest.mark.parametrize("raw", [
    b"cos\nsystem\n.", b"(S'ls'\nios\nsystem\n.", b"(S'ls'\nicollections \nOrderedDict\n.",  # GLOBAL, INST, a blank
    b"ccollections\nOrderedDict.__init__\n.", b"ccollections OrderedDict\n\n.", b"c\ncollections OrderedDict\n.",
    b"ccoll\\x65ctions\nOrderedDict\n.",  # an escape that genops undoes and pickle does not
    b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00.",  # EXT1, EXT2, EXT4
    b"Pname\n.", b"K\x01Q.", b"\x8c\x02os\x8c\x06system\x93.",  # PERSID, BINPERSID, STACK_GLOBAL
    b"", b"not a pickle", b"\x80\x02]q\x00", b"X\xff\xff\xff\x7fabc.", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f."])
def test_other_ways_to_a_name_and_broken_pickles_are_refused(raw, tmp_path):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(ValueError, match="x: not opened, it is no pickle of plain data") as caught:
        check_pickle(tmp_path / "x", OWN)
    assert "\n" not in str(caught.value)


def test_the_allowed_names_are_a_collection(tmp_path):
    (tmp_path / "x").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(TypeError, match="allowed: the text 'os system'"): check_pickle(tmp_path / "x", "os system")


# ---- the module

def test_the_room_needs_only_the_standard_library_and_tqdm():
    code = ("import sys, temp_nce.sources\n"
            "print(sorted({'torch', 'numpy', 'torchvision', 'sklearn', 'scipy', 'PIL'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
