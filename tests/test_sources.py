"""Sources: facts that do not drift, downloads that survive a bad line, archives that cannot escape, commands that end with a clear word."""
import argparse
import hashlib
import io
import json
import random
import shutil
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from erwin_nsa.data import sources, store
from erwin_nsa.data.sources import DownloadError, Source, SourceFile, download, load_sources, parse_toml, unpack
from erwin_nsa.data.store import CloudSample, CloudStore, write_clouds

BODY = bytes(range(256)) * 8
QUICK = dict(pause=0, progress=False, timeout=10, tries=2)


class Server:
    "A server on this machine whose manners a test sets."
    def __init__(self):
        self.body, self.mark, self.cut, self.ranges, self.length, self.chunked, self.status = BODY, '"v1"', None, True, True, False, 200
        self.asked, self.before = [], lambda: None
        me = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self): me.answer(self)
            def log_message(self, *_): pass
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/data.zip"
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(.01,), daemon=True)
        self.thread.start()

    def answer(self, h):
        self.before()
        wanted, condition = h.headers.get("Range"), h.headers.get("If-Range")
        start = int(wanted[6:-1]) if wanted and self.ranges and condition in (None, self.mark) else 0
        self.asked.append(start)
        h.close_connection = True
        if self.status != 200 or start >= len(self.body) > 0:
            h.send_response(self.status if self.status != 200 else 416)
            h.send_header("Content-Length", "0")
            return h.end_headers()
        data = self.body[start:]
        h.send_response(206 if start else 200)
        if start: h.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        if self.mark: h.send_header("ETag", self.mark)
        if self.chunked: h.send_header("Transfer-Encoding", "chunked")
        elif self.length: h.send_header("Content-Length", str(len(data)))
        h.send_header("Connection", "close")
        h.end_headers()
        sent = data[:self.cut]
        if self.chunked: sent = b"%x\r\n" % len(data) + sent + (b"\r\n0\r\n\r\n" if self.cut is None else b"")
        h.wfile.write(sent)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    s = Server()
    yield s
    s.httpd.shutdown()
    s.httpd.server_close()
    s.thread.join()


def names(folder): return sorted(p.name for p in Path(folder).iterdir())


# ---- facts

def test_facts_are_those_that_were_read():
    known = load_sources()
    assert list(known) == ["shapenet_car", "cosmology", "molecular_dynamics"]
    assert [s.size for s in known.values()] == ["about 2 GB", "about 7 GB", "about 13 GB"]
    car, halos, chains = known.values()
    assert car.files[0].url == "http://www.nobuyuki-umetani.com/publication/mlcfd_data.zip" and "Umetani" in car.citation
    assert halos.files[0].url == "https://zenodo.org/api/records/11479419/files-archive" and "10.5281/zenodo.11479419" in halos.origin
    assert "6764836" in chains.files[0].url and "kyonofx/mlcgmd" in chains.origin and "90 train, 10 val and 40 test" in chains.contents
    for s in known.values():
        assert s.manual and s.licence and s.units and all(f.sha256 is None and f.bytes is None for f in s.files)      # unknown stays unknown
    assert "not stated" in car.licence and "unknown" in halos.licence and "unknown" in chains.licence
    assert "500 tau" in chains.units                                                                                # the trap of the test frames


def test_small_reader_agrees_with_tomllib():
    """What Python 3.10 would read is what 3.11 reads."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib to compare with")
    text = sources.sources_file().read_text(encoding="utf-8")
    assert parse_toml(text) == tomllib.loads(text)
    more = 'a = "x \\" # = [ y"  # c\nb = [1, 2,\n 3]\nc = true\nd = 1_000.5\n[t.u]\ne = \'raw\'\n[[t.v]]\n[[t.v]]\nf = false\n'
    assert parse_toml(more) == tomllib.loads(more)


def test_package_reads_its_sources_without_tomllib(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    assert list(load_sources()) == ["shapenet_car", "cosmology", "molecular_dynamics"]


@pytest.mark.parametrize("change, message", [
    (lambda t: t.replace("licence = ", "license = ", 1), r"\[shapenet_car\]: expected keys .*missing \['licence'\], not known \['license'\]"),
    (lambda t: t.replace("sha256", "sha512", 1), r"missing \['sha256'\]"),
])
def test_a_wrong_sources_file_names_the_key(tmp_path, change, message):
    text = sources.sources_file().read_text(encoding="utf-8").split("\n", 4)[4]
    (tmp_path / "s.toml").write_text(change(text), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_sources(tmp_path / "s.toml")


# ---- downloads

def test_plain_download_is_whole_and_leaves_nothing_beside_it(tmp_path, server):
    server.before = lambda: server.asked.append(names(tmp_path))
    assert download(server.url, tmp_path / "a", sha256=hashlib.sha256(BODY).hexdigest(), size=len(BODY), **QUICK).read_bytes() == BODY
    assert names(tmp_path) == ["a"] and server.asked == [["a.part"], 0]      # never under its own name before the end
    download(server.url, tmp_path / "a", **QUICK)
    assert len(server.asked) == 2                                            # not asked again


@pytest.mark.parametrize("chunked", [False, True])
def test_a_cut_line_is_resumed(tmp_path, server, chunked):
    """Whether the length was announced or the end marked, each new connection asks for what is missing."""
    server.cut, server.chunked = 300, chunked
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == BODY
    assert server.asked == list(range(0, len(BODY), 300)) and names(tmp_path) == ["a"]


def test_another_process_resumes(tmp_path, server):
    """Given up after cuts without progress, the part stays; a later call goes on from there."""
    server.cut = 700
    server.before = lambda: setattr(server, "cut", 700 if not server.asked else 0)
    with pytest.raises(DownloadError, match=r"tries again and goes on after the 700 bytes in .*a\.part"):
        download(server.url, tmp_path / "a", **QUICK)
    assert names(tmp_path) == ["a.part", "a.part.json"]
    server.before, server.cut = lambda: None, None
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == BODY and server.asked[-1] == 700


def test_a_file_that_changed_meanwhile_starts_anew(tmp_path, server):
    server.cut, new = 700, BODY[::-1]

    def change():
        if server.asked: server.body, server.mark, server.cut = new, '"v2"', None
    server.before = change
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == new and server.asked == [0, 0]


@pytest.mark.parametrize("mark, digest, starts", [(None, None, [0, 0]), ('W/"v1"', None, [0, 0]), (None, hashlib.sha256(BODY).hexdigest(), [0, 900])])
def test_pieces_are_joined_only_if_something_proves_that_they_fit(tmp_path, server, mark, digest, starts):
    """No strong mark of the version and no checksum: from the beginning. With a checksum: resumed, and proved at the end."""
    server.mark, server.cut = mark, 900
    server.before = lambda: setattr(server, "cut", None if server.asked else 900)
    assert download(server.url, tmp_path / "a", sha256=digest, **QUICK).read_bytes() == BODY and server.asked == starts


def test_a_server_without_ranges_sends_everything_again(tmp_path, server):
    server.ranges, server.cut = False, 900
    server.before = lambda: setattr(server, "cut", None if server.asked else 900)
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == BODY


def test_a_complete_part_only_gets_its_name(tmp_path, server):
    """Killed between the last byte and the renaming."""
    (tmp_path / "a.part").write_bytes(BODY)
    (tmp_path / "a.part.json").write_text(json.dumps(dict(url=server.url, mark='"v1"', total=len(BODY))))
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == BODY and server.asked == [] and names(tmp_path) == ["a"]


@pytest.mark.parametrize("note", ["", "{", '{"url": "http://elsewhere/", "mark": "v"}', None])
def test_a_part_of_unknown_origin_is_not_continued(tmp_path, server, note):
    (tmp_path / "a.part").write_bytes(b"something else")
    if note is not None: (tmp_path / "a.part.json").write_text(note)
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == BODY and server.asked == [0]


def test_a_part_longer_than_the_file_starts_anew(tmp_path, server):
    (tmp_path / "a.part").write_bytes(BODY + b"tail")
    (tmp_path / "a.part.json").write_text(json.dumps(dict(url=server.url, mark='"v1"', total=None)))
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == BODY


@pytest.mark.parametrize("how, message", [(dict(sha256="0" * 64), "expected sha256 0{64}, found [0-9a-f]{64}"), (dict(size=7), "expected size 7, found 2048")])
def test_a_wrong_file_is_refused_and_removed(tmp_path, server, how, message):
    with pytest.raises(DownloadError, match=message):
        download(server.url, tmp_path / "a", **how, **QUICK)
    assert names(tmp_path) == []


def test_an_end_that_cannot_be_known_is_refused(tmp_path, server):
    """No length, no end mark, no checksum: a cut file would look whole. With a checksum the same answer is fine."""
    server.length = False
    with pytest.raises(DownloadError, match="states no size and no checksum"):
        download(server.url, tmp_path / "a", **QUICK)
    assert not (tmp_path / "a").exists()
    assert download(server.url, tmp_path / "b", sha256=hashlib.sha256(BODY).hexdigest(), **QUICK).read_bytes() == BODY


def test_no_room_is_said_before_the_first_byte(tmp_path, server, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DownloadError, match="needed 0.00 GB, found 0.00 GB free; make room"):
        download(server.url, tmp_path / "a", **QUICK)
    assert names(tmp_path) in ([], ["a.part", "a.part.json"]) and not any((tmp_path / n).stat().st_size for n in names(tmp_path) if n == "a.part")


def test_a_disk_that_fills_up_keeps_what_came(tmp_path, server, monkeypatch):
    class Full:
        def __init__(self, f): self.f, self.room = f, 1000
        def __getattr__(self, k): return getattr(self.f, k)

        def write(self, b):
            if len(b) > self.room: raise OSError(28, "No space left on device")
            self.room -= len(b)
            return self.f.write(b)
    real = sources._locked

    @sources.contextmanager
    def locked(part):
        with real(part) as f: yield Full(f)
    server.cut = 600
    monkeypatch.setattr(sources, "_locked", locked)
    server.before = lambda: setattr(server, "cut", None if server.asked else 600)
    with pytest.raises(DownloadError, match="the disk is full.*goes on after the 600 bytes"):
        download(server.url, tmp_path / "a", **QUICK)
    monkeypatch.setattr(sources, "_locked", real)
    assert download(server.url, tmp_path / "a", **QUICK).read_bytes() == BODY and server.asked == [0, 600, 600]


def test_two_processes_do_not_write_one_part(tmp_path, server):
    pytest.importorskip("fcntl", reason="no file locks on this system")
    (tmp_path / "a.part").write_bytes(b"")
    with sources._locked(tmp_path / "a.part"), pytest.raises(DownloadError, match="another process is writing it"):
        download(server.url, tmp_path / "a", **QUICK)


@pytest.mark.parametrize("status, tries", [(404, 1), (403, 1), (503, 2)])
def test_refusals_are_final_and_failures_are_tried_again(tmp_path, server, status, tries):
    server.status = status
    with pytest.raises(DownloadError, match=str(status) if status < 500 else "tries again"):
        download(server.url, tmp_path / "a", **QUICK)
    assert len(server.asked) == tries and names(tmp_path) == []


# ---- archives

def packed(members, mode="w:gz"):
    "Bytes of a tar."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, str): info.type, info.linkname = tarfile.SYMTYPE, data
            else: info.size = len(data)
            t.addfile(info, None if isinstance(data, str) else io.BytesIO(data))
    return out.getvalue()


def zipped(path, members):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in members: z.writestr(name, data)
    return path


def test_tars_inside_a_zip_are_opened(tmp_path):
    """With the name of the tar above its contents, whether or not they begin with it; directories and links are not taken."""
    a = packed([("param0/c/press.npy", b"1"), ("param0/c/link", "/etc/passwd")])
    b = packed([("./c/press.npy", b"2")], "w")
    unpack(zipped(tmp_path / "x.zip", [("top/param0.tar.gz", a), ("top/param1.tar", b), ("top/readme.txt", b"3"), ("top/empty/", b"")]), tmp_path / "raw", progress=False)
    found = {str(p.relative_to(tmp_path / "raw")): p.read_bytes() for p in (tmp_path / "raw").rglob("*") if p.is_file()}
    assert found == {"top/param0/c/press.npy": b"1", "top/param1/c/press.npy": b"2", "top/readme.txt": b"3"}
    assert names(tmp_path) == ["raw", "x.zip"]


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "..\\out"])
@pytest.mark.parametrize("inside", ["zip", "tar"])
def test_members_cannot_leave_the_folder(tmp_path, name, inside):
    archive = tmp_path / "evil.zip"
    zipped(archive, [("ok.txt", b""), (name, b"x") if inside == "zip" else ("t.tar.gz", packed([(name, b"x")]))])
    with pytest.raises(ValueError, match="evil.zip: member .*expected a path inside the folder"):
        unpack(archive, tmp_path / "raw", progress=False)
    assert names(tmp_path) == ["evil.zip"]


def test_every_truncation_of_an_archive_is_reported(tmp_path):
    """Cut anywhere, as a zip, as a tar, and as a tar inside a whole zip: named, and nothing is left."""
    a, b = random.Random(0).randbytes(3000), random.Random(1).randbytes(3000)
    tar = packed([("p/a.npy", a), ("p/b.npy", b)])
    whole = zipped(tmp_path / "w.zip", [("p.tar.gz", tar)]).read_bytes()
    plain = packed([("p/a.npy", a), ("p/b.npy", b)], "w")
    unpack(tmp_path / "w.zip", tmp_path / "ok", progress=False)
    (tmp_path / "w.tar").write_bytes(plain)
    unpack(tmp_path / "w.tar", tmp_path / "ok2", progress=False)
    for part in (0, 10, 100, 3584, len(tar) - 1):       # 3584: a plain tar between two members
        cases = {"cut.zip": whole[:part], "cut.tar.gz": tar[:part], "cut.tar": plain[:min(part, 7000)]}
        for name, cut in cases.items():
            (tmp_path / name).write_bytes(cut)
        zipped(tmp_path / "inner.zip", [("p.tar.gz", tar[:part])])
        for name in (*cases, "inner.zip"):
            with pytest.raises(ValueError, match=f"{name}.*expected a whole zip or tar archive"):
                unpack(tmp_path / name, tmp_path / "raw", progress=False)
            assert not (tmp_path / "raw").exists() and not [n for n in names(tmp_path) if n.startswith(".")]


# ---- commands

def reader(folder, out):
    "Stands for a data set's converter: a file of numbers becomes a cloud."
    values = [float(v) for v in (Path(folder) / "top" / "numbers.txt").read_text().split()]
    return write_clouds(out, [CloudSample([[v, 0, 0] for v in values], None, None, "c")],
                        attributes=dict(generator="tests", parameters="none", seed=0, units="m", licence="none"))


@pytest.fixture
def little(server, monkeypatch, tmp_path):
    "One data set, on the server of this test."
    server.body = zipped(tmp_path / "x.zip", [("top/numbers.txt", "1 2 3"), ("top/unwanted.bin", "x")]).read_bytes()
    (tmp_path / "x.zip").unlink()
    module = type(sys)("little_reader")
    module.convert, module.wanted = reader, lambda path: path.suffix == ".txt"
    monkeypatch.setitem(sys.modules, "little_reader", module)
    words = {k: k for k in ("title", "origin", "licence", "citation", "size", "contents", "units")}
    source = Source("little", **words, gigabytes=1e-6, reader="little_reader:convert", converted="little.h5", manual=("Ask the author.", "Copy it."),
                    files=(SourceFile("data.zip", server.url, None, None),))
    monkeypatch.setattr(sources, "load_sources", lambda: {"little": source})
    return tmp_path


def test_get_verify_convert_describe(little, server):
    """From nothing to a store, with the archive and the result on record."""
    assert "not here" in sources.describe("little", little) and "not yet" in sources.describe("little", little)
    server.cut = 50
    file, = sources.get("little", little, **QUICK)
    assert file.read_bytes() == server.body and sources.verify("little", little) == []
    record = json.loads((little / "little" / "downloads.json").read_text())
    assert record["data.zip"] == dict(url=server.url, bytes=len(server.body), sha256=hashlib.sha256(server.body).hexdigest())
    out = sources.convert("little", little, progress=False)
    assert CloudStore(out)[0].pos[:, 0].tolist() == [1, 2, 3] and not (little / "little/raw/top/unwanted.bin").exists()
    assert sources.verify("little", little) == [] and "1 clouds" in sources.describe("little", little)
    file.unlink()
    assert sources.verify("little", little) == []        # the archive may go once it is converted


def test_verify_names_every_change(little):
    file, = sources.get("little", little, **QUICK)
    out = sources.convert("little", little, progress=False)
    data = bytearray(file.read_bytes())
    data[30] ^= 1
    file.write_bytes(data)
    assert [c.split(": expected")[0] for c in sources.verify("little", little)] == [f"{file}: sha256"]
    file.write_bytes(data[:-1])
    assert [c.split(": expected")[0] for c in sources.verify("little", little)] == [f"{file}: bytes", f"{file}: sha256"]
    out.write_bytes(out.read_bytes()[:-200])
    assert len(sources.verify("little", little)) == 5 and "expected an HDF5 file" in sources.verify("little", little)[-1]
    (little / "little" / "downloads.json").unlink()
    assert "no digest is published or recorded" in sources.verify("little", little)[0]
    Path(f"{file}.part").write_bytes(b"")
    assert any("unfinished download" in c for c in sources.verify("little", little))


def test_no_network_gives_the_steps_by_hand(little, server, capsys):
    server.httpd.shutdown()
    server.httpd.server_close()
    with pytest.raises(DownloadError) as e:
        sources.get("little", little, **QUICK)
    for words in ("refused", "To do it by hand", "1. Ask the author.", "2. Copy it.", "3. Run: erwin-nsa data convert little"):
        assert words in str(e.value)
    with pytest.raises(FileNotFoundError, match="run: erwin-nsa data get little.*(.|\n)*1. Ask the author"):
        sources.convert("little", little)


def test_a_file_brought_by_hand_is_taken_and_recorded(little, server):
    (little / "little").mkdir()
    (little / "little" / "data.zip").write_bytes(server.body)
    assert len(sources.verify("little", little)) == 1
    sources.get("little", little, **QUICK)
    assert server.asked == [] and sources.verify("little", little) == []


def test_room_for_the_whole_set_is_checked_first(little, server, monkeypatch):
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    with pytest.raises(DownloadError, match="make room(.|\n)*by hand"):
        sources.get("little", little, **QUICK)
    assert server.asked == []


def test_a_failing_reader_leaves_no_result(little, monkeypatch):
    sources.get("little", little, **QUICK)

    def bad(folder, out):
        with store.replacing(out): raise ValueError("numbers.txt: expected numbers, found none")
    monkeypatch.setattr(sys.modules["little_reader"], "convert", bad)
    with pytest.raises(ValueError, match="numbers.txt"):
        sources.convert("little", little, progress=False)
    assert not (little / "little/little.h5").exists()


def test_commands_speak_and_end_with_a_status(little, server, capsys, monkeypatch):
    root = ["--root", str(little)]
    assert sources.main(["convert", "little", *root]) == 1
    assert "erwin-nsa data convert: " in capsys.readouterr().err
    assert [sources.main([action, "little", *root]) for action in ("get", "verify", "convert", "verify", "describe")] == [0] * 5
    said = capsys.readouterr().out
    assert str(little / "little" / "data.zip") in said and "all files are as recorded" in said and "1 clouds" in said
    (little / "little" / "data.zip").write_bytes(b"")
    assert sources.main(["verify", "little", *root]) == 1 and "expected" in capsys.readouterr().out
    assert sources.main(["describe"]) == 0 and "little" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        sources.main(["get", "other"])
    assert e.value.code == 2 and "invalid choice: 'other'" in capsys.readouterr().err
    parser = argparse.ArgumentParser()
    sources.add_commands(parser.add_subparsers())
    args = parser.parse_args(["data", "verify", "little", *root])
    assert args.run(args) == 1
    monkeypatch.setenv("ERWIN_NSA_DATA", str(little))
    assert sources.data_root() == little and sources.data_root("x") == Path("x")


def test_every_reader_can_be_imported():
    """The converters that sources.toml names are in this package."""
    import importlib
    for s in load_sources().values():
        module, _, function = s.reader.partition(":")
        loaded = importlib.import_module(module)
        assert not function or callable(getattr(loaded, function)), s.reader


def test_a_set_read_as_it_is_needs_no_conversion(little, monkeypatch):
    """Unpacked, and the folder is the answer."""
    import dataclasses
    plain = dataclasses.replace(sources.load_sources()["little"], reader="little_reader", converted="raw")
    monkeypatch.setattr(sources, "load_sources", lambda: {"little": plain})
    sources.get("little", little, **QUICK)
    assert sources.convert("little", little, progress=False) == little / "little" / "raw"
    assert "raw is here" in sources.describe("little", little) and sources.verify("little", little) == []
