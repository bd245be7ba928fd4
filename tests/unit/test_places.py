"""Data lies where people keep it: on object stores and the Hub, in several files with limits of their own."""

import http.server
import io
import json
import subprocess
import sys
import threading
from urllib.parse import unquote, urlsplit

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from lensmith.config.read import read_config
from lensmith.config.tree import Data, Images, Source
from lensmith.data.cache import cache_folder
from lensmith.data.encode import Encoder
from lensmith.data.images import header_px, open_image
from lensmith.data.remote import RemoteRoot
from lensmith.data.scan import scan_source
from lensmith.data.source import open_source, read_samples
from lensmith.errors import ConfigError, DataError, RowError


def png(width: int = 60, height: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def lines(*images: str) -> bytes:
    return "\n".join(json.dumps({"image": image, "question": "Q", "answer": "x"}) for image in images).encode()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Bucket(MemoryFileSystem):
    """Google's object store as fsspec sees it, in memory; counts what is fetched."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012 (as in the class above it, one for the process)
    pseudo_dirs = [""]  # noqa: RUF012
    fetched: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def cat_file(self, path, start=None, end=None, **options):
        self.fetched.append(path)
        return super().cat_file(path, start, end, **options)

    def get_file(self, rpath, lpath, **options):
        self.fetched.append(rpath)
        return super().get_file(rpath, lpath, **options)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Bucket)
    files = fsspec.filesystem("gs")
    Bucket.store.clear()
    del Bucket.fetched[:]
    files.pipe_file("gs://mine/set/rows.jsonl", lines("img/1.png", "img/2.png", "/mine/set/img/1.png"))
    files.pipe_file("gs://mine/set/img/1.png", png())
    files.pipe_file("gs://theirs/secret.png", png())
    return files


def fault(action) -> RowError:
    with pytest.raises(RowError) as caught:
        action()
    return caught.value


def test_data_file_is_fetched_once_and_pictures_when_they_are_needed(bucket):
    samples = read_samples("gs://mine/set/rows.jsonl")
    assert Bucket.fetched == ["/mine/set/rows.jsonl"]
    assert samples.sentences[0].startswith(f"gs://mine/set/rows.jsonl: fetched as {cache_folder()}")
    ref = samples[0].images[0]
    assert (ref.source, ref.key, samples[0].where) == ("gs://mine/set/img/1.png",) * 2 + ("rows.jsonl:1",)
    for _ in range(2):
        assert (header_px(ref), open_image(ref).size) == ((40, 60), (60, 40))
    assert Bucket.fetched == ["/mine/set/rows.jsonl", "/mine/set/img/1.png"]
    again = read_samples("gs://mine/set/rows.jsonl")
    assert "already as" in again.sentences[0]
    assert len(Bucket.fetched) == 2
    gone = fault(lambda: header_px(samples[1].images[0]))
    assert (gone.code, str(gone)) == ("missing_file", "gs://mine/set/img/2.png: there is no such file.")


def test_changed_data_file_is_fetched_again(bucket):
    assert len(read_samples("gs://mine/set/rows.jsonl")) == 3
    bucket.pipe_file("gs://mine/set/rows.jsonl", lines("img/1.png"))
    assert len(read_samples("gs://mine/set/rows.jsonl")) == 1


def test_addresses_that_lead_out_of_the_root_are_refused(bucket, tmp_path):
    assert fault(lambda: read_samples("gs://mine/set/rows.jsonl")[2]).code == "outside_root"
    root = RemoteRoot("gs://mine/set")
    assert (
        root.join("a/../img/1.png", "r:1") == root.join("gs://mine/set/img/1.png", "r:1") == "gs://mine/set/img/1.png"
    )
    for name in ("../../theirs/secret.png", "gs://theirs/secret.png", "gs://mine/set/../x.png", "s3://mine/set/1.png"):
        refused = fault(lambda name=name: root.join(name, "r:1"))
        assert refused.code == "outside_root", name
        assert "is outside gs://mine/set; set data.image_root" in str(refused)
    assert root.join("x::memory://a.png", "r:1") == "gs://mine/set/x::memory://a.png".replace("//a", "/a")
    (tmp_path / "rows.jsonl").write_bytes(lines("gs://theirs/secret.png"))
    data = Data(train=str(tmp_path / "rows.jsonl"))
    assert fault(lambda: read_samples(data)[0]).code == "outside_root", "a row must not spend the reader's login"
    trusted = read_samples(data.model_copy(update={"allow_outside": True}))[0].images[0]
    assert header_px(trusted) == (40, 60)
    assert Bucket.fetched[-1] == "/theirs/secret.png"


def test_image_root_may_be_elsewhere_than_the_rows(bucket, tmp_path):
    (tmp_path / "run.yaml").write_text("data: {train: rows.jsonl, image_root: gs://mine/set/}")
    (tmp_path / "rows.jsonl").write_bytes(lines("img/1.png"))
    data = read_config(tmp_path / "run.yaml").data
    assert data.image_root == "gs://mine/set/", "an address stays as it is written"
    assert header_px(read_samples(data)[0].images[0]) == (40, 60)


def test_folders_and_missing_files_have_sentences(bucket):
    with pytest.raises(DataError, match=r"gs://mine/set: is a folder \(img, rows\.jsonl\); name the data file in it"):
        read_samples("gs://mine/set")
    with pytest.raises(DataError, match=r"gs://mine/gone\.jsonl: there is no such file; check the address"):
        read_samples("gs://mine/gone.jsonl")
    bucket.pipe_file("gs://mine/rows.xlsx", b"x")
    with pytest.raises(DataError, match=r"is a \.xlsx file; Lensmith reads"):
        read_samples("gs://mine/rows.xlsx")


def test_no_network_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    program = "from lensmith.data.source import read_samples\nread_samples('hf://datasets/owner/name/rows.jsonl')"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False).stderr
    assert "DataError: hf://datasets/owner/name/rows.jsonl: cannot be fetched" in told


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    with pytest.raises(
        DataError, match=r"gs:// needs a library that is not installed .*pip install 'lensmith\[cloud\]'"
    ):
        read_samples("gs://mine/rows.jsonl")
    with pytest.raises(DataError, match=r"pip install 'lensmith\[cloud\]'"):
        RemoteRoot("gs://mine")


# --- a real client and a small server that speaks as much of S3 as it asks for ------------------------------------------


@pytest.fixture
def s3(monkeypatch):
    stored = {"/mine/rows.jsonl": lines("1.png"), "/mine/1.png": png()}
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            is_listing = "list-type" in self.path
            content = b"<ListBucketResult></ListBucketResult>" if is_listing else stored.get(path)
            self.send_response(404 if content is None else 200)
            content = content or b""
            self.send_header("ETag", f'"{hash(content)}"')
            self.send_header("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").clear_instance_cache()
    yield asked
    fsspec.filesystem("s3").clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_s3_is_read_by_its_real_client(s3):
    samples = read_samples("s3://mine/rows.jsonl")
    ref = samples[0].images[0]
    assert (ref.source, header_px(ref), open_image(ref).size) == ("s3://mine/1.png", (40, 60), (60, 40))
    assert [line for line in s3 if line.startswith("GET") and line.endswith(".png")] == ["GET /mine/1.png"]
    with pytest.raises(DataError, match=r"s3://mine/gone\.jsonl: there is no such file"):
        read_samples("s3://mine/gone.jsonl")


# --- several files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_files(tmp_path):
    (tmp_path / "large.png").write_bytes(png(640, 320))
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines("large.png"))
    return tmp_path


def sources(folder, *images: Images | None) -> Data:
    named = zip("ab", images, strict=False)
    return Data(train=[Source(path=str(folder / f"{name}.jsonl"), image=image) for name, image in named])


def scan_of(data, processor, **options):
    encoder = Encoder.from_processor(processor, Images(max_tokens=64))
    source = open_source(data, encoder, which="train")
    settings = {"budget_tokens": 400, "on_long": "error", "on_bad_row": "error", "seed": 0} | options
    return scan_source(source, **settings)


def test_each_file_has_the_token_limits_that_it_names(two_files, processor):
    scan = scan_of(sources(two_files, None, Images(max_tokens=20)), processor)
    first, second = (scan.source.encoded(row).images[0].tokens for row in (0, 1))
    assert (first <= 64, first > 40, second <= 20, second > 10) == (True,) * 4
    assert list(scan.image_tokens) == [first, second]
    assert "reduced to image.max_tokens of their file (20 to 64)" in scan.sentences()[0]
    asked = scan.source.encoder.encode_prompt(scan.source.sample(1))
    assert asked.images[0].tokens == second, "questions are asked with the pictures that were trained on"


def test_limits_of_a_file_bound_what_shrinking_may_do(two_files, processor):
    data = sources(two_files, Images(min_tokens=55, max_tokens=60), Images(min_tokens=8, max_tokens=60))
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used:\n  a\.jsonl:1: .*smaller images would not do"):
        scan_of(data, processor, on_long="shrink", budget_tokens=50)


def test_contradicting_limits_of_a_file_name_it(two_files, processor):
    with pytest.raises(
        ConfigError, match=r"data\.train\[1\]\.image\.min_tokens is 30 but data\.train\[1\]\.image\.max"
    ):
        scan_of(sources(two_files, None, Images(min_tokens=30, max_tokens=20)), processor)


def test_limits_of_a_file_survive_the_settings_file(two_files):
    (two_files / "run.yaml").write_text("data: {train: [{path: a.jsonl, weight: 2, image: {max_tokens: 20}}]}")
    train = read_config(two_files / "run.yaml").data.train
    assert isinstance(train, list)
    assert (train[0].path, train[0].weight) == (str(two_files / "a.jsonl"), 2)
    assert train[0].image == Images(max_tokens=20)
