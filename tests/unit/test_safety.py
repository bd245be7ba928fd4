"""A data file from anywhere stays data: it names files of its folder only, reaches no private network and runs no code."""

import contextlib
import http.server
import io
import ipaddress
import json
import pickle
import sys
import threading
import time
import zipfile

import pytest
from PIL import Image

from lensmith.config.tree import Data
from lensmith.data import fetch
from lensmith.data.cache import cache_folder, open_cached
from lensmith.data.fetch import fetch_image, is_public
from lensmith.data.images import header_px, open_image
from lensmith.data.places import LocalRoot, open_ref
from lensmith.data.refs import RefReader
from lensmith.data.rows import open_rows
from lensmith.data.source import read_samples
from lensmith.errors import DataError, RowError
from lensmith.types import ImageRef


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """data/in.png and data/sub/in.png, beside secret.png and other/out.png."""
    for name in ("data/in.png", "data/sub/in.png", "secret.png", "other/out.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    return tmp_path / "data"


def fault(action) -> RowError:
    with pytest.raises(RowError) as caught:
        action()
    return caught.value


def find(root, name, **options) -> str:
    path, member = LocalRoot(root, **options).find(str(name), "rows.jsonl:1")
    return path if member is None else f"{path}!{member}"


# --- paths --------------------------------------------------------------------------------------------------------------


def test_paths_inside_the_root_are_found_however_they_are_written(root):
    (root / "link.png").symlink_to("sub/in.png")
    (root.parent / "alias").symlink_to(root)
    for name in ("in.png", "./sub/../in.png", "sub/in.png", root / "in.png", "link.png", "sub/../link.png"):
        assert find(root, name).startswith(f"{root}/")
    assert find(root.parent / "alias", root / "in.png") == str(root / "in.png"), "the same folder by its other name"
    assert find(root.parent / "alias", "in.png") == f"{root.parent}/alias/in.png"
    assert find("/", root / "in.png") == str(root / "in.png")


def test_paths_that_lead_out_are_refused_and_allowed_by_a_setting(root):
    (root / "file-link.png").symlink_to("../secret.png")
    (root / "folder-link").symlink_to("../other")
    (root / "chain").symlink_to("folder-link")
    (root / "sub" / "loop").symlink_to("loop")
    outside = {
        "../secret.png": root.parent / "secret.png",
        "sub/../../secret.png": root.parent / "secret.png",
        str(root.parent / "secret.png"): root.parent / "secret.png",
        "file-link.png": root / "file-link.png",
        "folder-link/out.png": root / "folder-link/out.png",
        "chain/out.png": root / "chain/out.png",
    }
    for name, path in outside.items():
        refused = fault(lambda name=name: find(root, name))
        assert refused.code == "outside_root", name
        assert f"outside {root}; set data.image_root to a folder that holds it, or data.allow_outside=true" in str(
            refused
        )
        assert find(root, name, allow_outside=True) == str(path)
    assert f"{root}/file-link.png leads to {root.parent}/secret.png, outside" in str(
        fault(lambda: find(root, "file-link.png"))
    )
    assert fault(lambda: find(root, "../gone.png")).code == "outside_root", "not even whether it is there is told"
    assert fault(lambda: find(root, f"{root}-twin/in.png")).code == "outside_root", "a longer name is another folder"
    assert fault(lambda: find(root, "sub/loop")).code == "missing_file"


def test_file_addresses_are_paths(root):
    reader = RefReader(root)
    assert reader.read(f"file://{root}/in.png", "r:1")[0][0].source == root / "in.png"
    (root / "two words.png").write_bytes((root / "in.png").read_bytes())
    assert reader.read(f"file://{root}/two%20words.png", "r:1")[0][0].source == root / "two words.png"
    assert fault(lambda: reader.read(f"file://{root.parent}/secret.png", "r:1")).code == "outside_root"


def test_names_that_no_file_can_have_are_missing(root):
    for name in ("a\0b.png", "\ud800.png", "a/\udfff/b.png"):
        refused = fault(lambda name=name: find(root, name))
        assert refused.code == "missing_file"
        assert str(refused).isprintable()
    assert fault(lambda: find(root, "x" * 5000)).code == "missing_file"
    assert fault(lambda: find(root, "new\nline.png")).sentence.isprintable()


def test_hub_snapshots_may_link_to_their_own_blobs(tmp_path):
    repository = tmp_path / "datasets--owner--name"
    (repository / "blobs").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(repository / "blobs" / "f00d", "PNG")
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../blobs/f00d")
    (snapshot / "b.png").symlink_to("/etc/hostname")
    assert find(snapshot, "a.png") == str(snapshot / "a.png")
    assert fault(lambda: find(snapshot, "b.png")).code == "outside_root"


def test_settings_reach_the_rows(root):
    (root / "rows.jsonl").write_text(json.dumps({"image": "../secret.png", "answer": "x"}))
    with pytest.raises(RowError, match=r"rows\.jsonl:1: .*secret\.png is outside"):
        read_samples(root / "rows.jsonl")[0]
    data = Data(train=str(root / "rows.jsonl"))
    assert (
        read_samples(data.model_copy(update={"allow_outside": True}))[0].images[0].source == root.parent / "secret.png"
    )
    with pytest.raises(RowError, match=r"secret\.png is outside"):
        read_samples(data.model_copy(update={"image_root": root / "sub"}))[0]


def test_looking_for_a_picture_costs_microseconds(root):
    """8 us measured; the bound is for machines under load."""
    reader = LocalRoot(root)
    started = time.perf_counter()
    for _ in range(2000):
        reader.find("sub/in.png", "r:1")
    assert (time.perf_counter() - started) / 2000 < 200e-6


# --- archives -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(root):
    with zipfile.ZipFile(root / "photos.zip", "w") as file:
        file.write(root / "in.png", "img/1.png")
        file.write(root / "in.png", "../secret.png")
        file.writestr("bomb.png", bytes(fetch.MAX_BYTES + 1), zipfile.ZIP_DEFLATED)
    return root / "photos.zip"


def test_pictures_inside_a_zip_are_read_in_place(root, archive):
    ref = RefReader(root).read("photos.zip/img/1.png", "r:1")[0][0]
    assert (ref.source, ref.member, ref.key) == (archive, "img/1.png", f"{archive}/img/1.png")
    assert (header_px(ref), open_image(ref).size) == ((40, 60), (60, 40))
    assert pickle.loads(pickle.dumps(ref)) == ref
    assert sorted(path.name for path in root.iterdir()) == ["in.png", "photos.zip", "sub"], "nothing was unpacked"


def test_members_that_lead_out_or_unfold_too_far_are_refused(root, archive):
    reader = RefReader(root)
    assert fault(lambda: reader.read("photos.zip/../../secret.png", "r:1")).code == "outside_root"
    gone = fault(lambda: reader.read("photos.zip/img/2.png", "r:1"))
    assert (gone.code, "holds 3 members, and none called img/2.png" in str(gone)) == ("missing_file", True)
    bomb = fault(lambda: header_px(reader.read("photos.zip/bomb.png", "r:1")[0][0]))
    assert (bomb.code, "unfolds to 67,108,865 bytes" in str(bomb)) == ("decompression_bomb", True)
    (root / "link.zip").symlink_to("../elsewhere.zip")
    archive.rename(root.parent / "elsewhere.zip")
    assert fault(lambda: reader.read("link.zip/img/1.png", "r:1")).code == "outside_root"


def test_broken_zips_and_other_archives_have_sentences(root, archive):
    reader = RefReader(root)
    content = bytearray(archive.read_bytes())
    content[60] ^= 0xFF
    (root / "bent.zip").write_bytes(content)
    assert "cannot be unpacked" in str(fault(lambda: header_px(reader.read("bent.zip/img/1.png", "r:1")[0][0])))
    (root / "cut.zip").write_bytes(content[:100])
    assert "cannot be read as .zip" in str(fault(lambda: reader.read("cut.zip/img/1.png", "r:1")))
    (root / "photos.tar.gz").write_bytes(b"x")
    tar = fault(lambda: reader.read("photos.tar.gz/img/1.png", "r:1"))
    assert "has no index to read img/1.png by; unpack it, or pack it again as .zip" in str(tar)
    assert fault(lambda: reader.read("gone.zip/img/1.png", "r:1")).code == "missing_file"


# --- addresses ----------------------------------------------------------------------------------------------------------


class Server:
    """What is asked for, from a real server on this machine."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.drip_s: dict[str, float] = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                status, headers, body = outer.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                pause = outer.drip_s.get(self.path)
                try:
                    for piece in [body] if pause is None else [body[n : n + 1] for n in range(len(body))]:
                        self.wfile.write(piece)
                        self.wfile.flush()
                        time.sleep(pause or 0)
                except OSError:
                    pass  # the reader had enough

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    started = Server()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


def anywhere(_) -> bool:
    return True


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
     "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
     "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:db8::1"],
)  # fmt: skip
def test_private_addresses_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"])
def test_this_machine_is_never_asked_however_it_is_called(server, host):
    port = server.address.rpartition(":")[2]
    refused = fault(lambda: header_px(ImageRef(f"http://{host}:{port}/flag.png", "x")))
    assert refused.code == "private_address"
    assert "inside a private network or this machine" in str(refused)
    assert server.asked == []


def test_every_address_of_a_name_is_checked_and_the_checked_one_is_connected_to(server, picture, monkeypatch):
    """A name server that answers differently each time gains nothing: it is asked once."""
    server.answers["/a.png"] = (200, {"Content-Length": str(len(picture))}, picture)
    port = int(server.address.rpartition(":")[2])
    answers = [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"]]
    real = fetch.socket.getaddrinfo

    def name_server(host, port, *arguments, **options):
        if not host.endswith(".example"):
            return real(host, port, *arguments, **options)
        return [(0, 0, 0, "", (place, port)) for place in answers.pop(0)]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", name_server)
    assert fetch_image(f"http://one.example:{port}/a.png", may_reach=anywhere).read() == picture
    assert "two.example is 10.0.0.1" in str(fault(lambda: fetch_image(f"http://two.example:{port}/a.png")))
    assert answers == []


def test_picture_at_an_address_is_fetched_once(server, picture):
    server.answers["/a%20b.png?x=1"] = (200, {"Content-Length": str(len(picture))}, picture)
    ref = ImageRef(f"{server.address}/a b.png?x=1", "x")
    for _ in range(2):
        assert fetch_image(str(ref), may_reach=anywhere).read() == picture
    assert header_px(ref) == (40, 60), "from the cache, so that nothing is asked for"
    assert len(server.asked) == 1
    gone = fault(lambda: fetch_image(f"{server.address}/gone.png", may_reach=anywhere))
    assert (gone.code, "cannot be fetched (HTTP 404 Not Found); download it" in str(gone)) == ("missing_file", True)


def test_redirects_are_checked_like_addresses(server, picture):
    server.answers["/a.png"] = (302, {"Location": "/b.png"}, b"")
    server.answers["/b.png"] = (200, {}, picture)
    assert fetch_image(f"{server.address}/a.png", may_reach=anywhere).read() == picture
    server.answers["/c.png"] = (302, {"Location": "http://[::1]/b.png"}, b"")
    inward = fault(lambda: fetch_image(f"{server.address}/c.png", may_reach=lambda place: place.version == 4))
    assert inward.code == "private_address"
    server.answers["/d.png"] = (302, {"Location": "file:///etc/hostname"}, b"")
    assert "no http(s) address" in str(fault(lambda: fetch_image(f"{server.address}/d.png", may_reach=anywhere)))
    server.answers["/e.png"] = (302, {"Location": "/e.png"}, b"")
    assert "more than 5 redirects" in str(fault(lambda: fetch_image(f"{server.address}/e.png", may_reach=anywhere)))


def test_answers_that_are_too_large_too_slow_or_cut_off_are_refused(server, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 100)
    server.answers["/large"] = (200, {}, bytes(101))
    large = fault(lambda: fetch_image(f"{server.address}/large", may_reach=anywhere))
    assert large.code == "unreadable_image"
    server.answers["/slow"] = (200, {}, bytes(90))
    server.drip_s["/slow"] = 0.05
    started = time.monotonic()
    slow = fault(lambda: fetch_image(f"{server.address}/slow", may_reach=anywhere, timeout_s=0.3))
    assert "not done after 0.3 s" in str(slow)
    assert time.monotonic() - started < 3, "and not 90 x 0.05 s"
    server.answers["/cut"] = (200, {"Content-Length": "50"}, bytes(20))
    assert "cut off, 30 bytes before the end" in str(
        fault(lambda: fetch_image(f"{server.address}/cut", may_reach=anywhere))
    )


def test_addresses_are_off_until_they_are_allowed(root):
    refused = fault(lambda: RefReader(root).read("https://example.org/a.png", "r:1"))
    assert (refused.code, "set data.allow_urls=true" in str(refused)) == ("url_not_allowed", True)
    assert RefReader(root, allow_urls=True).read("https://example.org/a.png", "r:1")[0][0].source.startswith("https")


def test_cache_forgets_the_oldest_pictures(tmp_path):
    for number in range(600):
        open_cached(f"https://example.org/{number}", lambda: io.BytesIO(bytes(1000)), limit_bytes=256 * 1500)
    kept = [path for path in (cache_folder() / "pictures").rglob("*") if path.is_file()]
    assert 200 < len(kept) <= 256, "one of 1000 bytes in each of the folders that any fell into"
    assert cache_folder().stat().st_mode & 0o077 == 0


# --- code ---------------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


loaded: list[str] = []


@pytest.fixture(scope="module")
def pickle_watch():
    """Names every class that anything unpickles."""
    sys.addaudithook(lambda event, arguments: loaded.append(str(arguments)) if event == "pickle.find_class" else None)
    return loaded


def test_no_reader_unpickles_or_runs_anything(tmp_path, picture, pickle_watch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    evil = pickle.dumps(Payload(tmp_path / "was-here"))
    place = tmp_path / "data"
    place.mkdir()
    (place / "a.png").write_bytes(picture)
    for name in ("evil.png", "evil.zip", "evil.pdf", "evil.heic"):
        (place / name).write_bytes(evil)
    rows = [{"image": name, "answer": "x"} for name in ("a.png", "evil.png", "evil.zip/a.png", "evil.pdf", "evil.heic")]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": evil}
    fields = [pa.field("image", pa.string()), pa.field("answer", pa.string(), metadata=extension)]
    pq.write_table(pa.table([["a.png"], ["x"]], schema=pa.schema(fields, {"pandas": evil})), place / "rows.parquet")
    Dataset.from_list([{"image": "a.png", "answer": "x", "evil": evil}]).save_to_disk(place / "set")
    del pickle_watch[:]
    for data in ("rows.jsonl", "rows.parquet", "set"):
        samples = read_samples(place / data)
        for number in range(len(samples)):
            with contextlib.suppress(RowError):
                header_px(samples[number].images[0])
    for evil_rows in ("rows.json", "rows.csv", "bent.parquet"):
        (place / evil_rows).write_bytes(evil)
        with pytest.raises(DataError):
            read_samples(place / evil_rows)[0]
    assert pickle_watch == []
    assert not (tmp_path / "was-here").exists()


def test_a_loading_script_is_no_data(tmp_path):
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "name.py").write_text("open('was-here', 'w')")
    with pytest.raises(DataError, match="holds no data file"):
        open_rows(tmp_path / "name")
    with pytest.raises(DataError, match=r"is a \.py file; Lensmith reads"):
        open_rows(tmp_path / "name" / "name.py")
    assert not (tmp_path / "was-here").exists()


def test_open_ref_gives_the_stored_bytes(root, archive, picture):
    for ref in (ImageRef(root / "in.png", ""), ImageRef(archive, "", member="img/1.png")):
        with open_ref(ref) as file:
            assert file.read() == (root / "in.png").read_bytes()
    assert open_ref(ImageRef(picture, "")).read() == picture
