"""Bundles at URLs: real servers on this machine, and fsspec's own stores in memory and on disk."""

from __future__ import annotations

import gzip
import http.server
import importlib.util
import shutil
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from factories import make_device, make_profile, make_workload, run_python

from autochunk.errors import BundleError
from autochunk.resolution.layers import BundleLayer
from autochunk.store import bundle, files, json_text, remote

pytest.importorskip("fsspec")

PROFILES = [make_profile(make_workload(f"t={t},k=8"), make_device(kind="A")) for t in (1, 2, 3)]
TEXT = bundle.dump(PROFILES)

# What was written to the server.
KEPT: list[bytes] = []


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path; whatever it says, it says to HEAD, too."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Calls the method of the path's name."""
        getattr(self, "_" + self.path.strip("/").partition(".")[0], self._missing)()

    def do_HEAD(self) -> None:
        """The same without a body."""
        self.do_GET()

    def do_PUT(self) -> None:
        """Takes what is written to /kept.json."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        KEPT.append(body)
        self._answer(b"", 201 if self.path == "/kept.json" else 403)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""

    def _answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _missing(self) -> None:
        self._answer(b"<html>\n</html>", 404)

    def _bundle(self) -> None:
        self._answer(TEXT.encode())

    def _compressed(self) -> None:
        self._answer(gzip.compress(TEXT.encode()))

    def _encoded(self) -> None:
        self._answer(gzip.compress(TEXT.encode()), headers={"Content-Encoding": "gzip"})

    def _page(self) -> None:
        self._answer(b"<html>log in first</html>")

    def _redirect(self) -> None:
        self._answer(b"", 302, {"Location": "/bundle.json"})

    def _to(self) -> None:
        self._answer(b"", 302, {"Location": self.path.partition(".")[2]})

    def _bomb(self) -> None:
        packer = zlib.compressobj(9, wbits=31)
        body = b"".join(packer.compress(b" " * 2**20) for _ in range(64)) + packer.flush()
        encoding = {"Content-Encoding": self.path.partition(".")[2]}
        self._answer(body, headers=encoding)

    def _loop(self) -> None:
        self._answer(b"", 302, {"Location": "/loop"})

    def _broken(self) -> None:
        self._answer(b"", 500)

    def _forbidden(self) -> None:
        self._answer(b"", 403)

    def _silent(self) -> None:
        time.sleep(2)

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while self.command == "GET":
            self.wfile.write(b" " * 2**16)

    def _dripping(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while self.command == "GET":
            self.wfile.write(b" ")
            time.sleep(0.05)

    def _understated(self) -> None:
        """To HEAD it says that it is small."""
        self._missized(10)

    def _overstated(self) -> None:
        self._missized(10**15)

    def _missized(self, size: int) -> None:
        headers = {"Content-Length": str(size)} if self.command == "HEAD" else {}
        self._answer(TEXT.encode(), headers=headers)

    def _unsized(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            self.wfile.write(TEXT.encode())

    def _cut(self) -> None:
        """It hangs up in the middle."""
        self.close_connection = True
        self._answer(TEXT.encode()[:100], headers={"Content-Length": str(len(TEXT))})

    def _garbage(self) -> None:
        self.close_connection = True
        self.wfile.write(b"\x00\x1b[31m\n\n")


class Server(http.server.ThreadingHTTPServer):
    """Leaves clients that hung up unmentioned."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a server that answers as its paths are named."""
    pytest.importorskip("aiohttp")
    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture(scope="module")
def safe_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The same by https, and the file of its certificate."""
    pytest.importorskip("aiohttp")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(
        [*make.split(), *names, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"https://127.0.0.1:{running.server_address[1]}", certificate
        running.shutdown()


def refused(url: str, timeout: float = 10.0) -> str:
    """The error of a URL that cannot be read: one line that begins with the URL."""
    with pytest.raises(BundleError) as error:
        bundle.read(url, timeout)
    message = str(error.value)
    assert message.startswith(f"{url}: ")
    assert message.isprintable()
    return message


# --- http -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("bundle.json", "bundle.json?signed=yes", "compressed.json.gz", "encoded"),
        *("redirect", "understated", "overstated", "unsized"),
    ],
)
def test_read_over_http(server: str, name: str) -> None:
    """Compressed or not, redirected or not, and whatever size the server claims."""
    assert bundle.read(f"{server}/{name}").profiles == tuple(PROFILES)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", "404"),
        ("forbidden", "403"),
        ("broken", "500"),
        ("loop", "TooManyRedirects"),
        ("page", "not a bundle of profiles"),
        ("cut", "ContentLengthError"),
        ("garbage", ""),
    ],
)
def test_what_a_server_may_answer(server: str, name: str, says: str) -> None:
    """The error says what the server said."""
    assert says in refused(f"{server}/{name}")


READ = """
import sys
from autochunk.store import bundle
for url in sys.argv[1:]:
    try:
        print(len(bundle.read(url).profiles))
    except ValueError as error:
        print(error)
"""


def test_https_leads_to_https_only(
    server: str, safe_server: tuple[str, str], tmp_path: Path
) -> None:
    """Where anybody on the way may answer, or to a file of this machine, it does not lead.

    The other way, to more safety, it may.
    """
    files.write(tmp_path / "b.json", TEXT)
    safe, certificate = safe_server
    file = f"file://{tmp_path}/b.json"
    urls = [f"{safe}/bundle.json", f"{safe}/redirect", f"{server}/to.{safe}/bundle.json"]
    bad = [f"{safe}/to.{server}/bundle.json", f"{safe}/to.{file}", f"{server}/to.{file}"]
    # aiohttp looks for certificates when it is imported.
    told = run_python(READ, *urls, *bad, SSL_CERT_FILE=certificate).splitlines()
    assert told[:3] == ["3", "3", "3"]
    assert "from https to http," in told[3]
    assert "from https to file," in told[4]
    assert "NonHttpUrlRedirect" in told[5]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
def test_what_unfolds_to_too_much_on_the_way(
    server: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB in 64 KiB, whatever the server calls it."""
    monkeypatch.setattr(json_text, "MOST_BYTES", 2**22)
    assert "a bundle has at most 4 MiB; this has more" in refused(f"{server}/bomb.{encoding}")


@pytest.mark.parametrize("chain", ["simplecache::", "filecache::", "zip://b.json::", "dir::"])
def test_a_url_is_of_one_place(chain: str, tmp_path: Path) -> None:
    """None through another, for which files of this machine would be read and written."""
    files.write(tmp_path / "b.json", TEXT)
    assert "must be of one place" in refused(f"{chain}file://{tmp_path}/b.json")


def test_an_address_of_ipv6_is_no_chain() -> None:
    """Though it has two colons."""
    assert "Connect" in refused("http://[::1]:9/b.json")


@pytest.mark.parametrize("name", ["silent", "dripping"])
def test_slow_server(server: str, name: str) -> None:
    """There is an end to waiting, also where a byte comes now and then."""
    started = time.monotonic()
    assert "not done after 0.7 seconds" in refused(f"{server}/{name}", timeout=0.7)
    assert time.monotonic() - started < 30


def test_reading_ends_when_it_is_given_up(server: str) -> None:
    """Nobody goes on loading what nobody waits for."""

    def loading() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name == "autochunk remote file"}

    before = loading()
    refused(f"{server}/dripping", timeout=0.3)
    deadline = time.monotonic() + 5
    while loading() - before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_endless_body(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read up to the limit."""
    monkeypatch.setattr(json_text, "MOST_BYTES", 2**22)
    assert "a bundle has at most 4 MiB; this has more" in refused(f"{server}/endless")


def test_no_server() -> None:
    """Nobody listens, or the name is none."""
    assert "Connect" in refused("http://127.0.0.1:9/bundle.json")
    assert refused("http://no.such.host.invalid/bundle.json", timeout=20)


def test_write_over_http(server: str) -> None:
    """Where a server lets itself be written to; where not, it says so in a line."""
    files.write(f"{server}/kept.json", TEXT)
    assert KEPT[-1] == TEXT.encode()
    with pytest.raises(BundleError, match=r"^http://.*/bundle.json: .*403"):
        files.write(f"{server}/bundle.json", TEXT)


# --- Other protocols ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bundle.json", "bundle.json.gz"])
@pytest.mark.parametrize("protocol", ["memory://folder", "file://"])
def test_write_and_read(tmp_path: Path, protocol: str, name: str) -> None:
    """What is written at a URL is read there."""
    url = f"{protocol}{tmp_path}/{name}" if protocol == "file://" else f"{protocol}/{name}"
    files.write(url, TEXT)
    assert bundle.read(url) == bundle.load(TEXT)
    assert files.fetch(url).startswith(b"\x1f\x8b" if name.endswith(".gz") else b"{")
    if protocol == "file://":
        assert bundle.read(tmp_path / name) == bundle.load(TEXT)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memory://nothing/here.json", "FileNotFoundError"),
        ("file:///nothing/here.json", "No such file or directory"),
        ("file:///tmp", "Is a directory"),
        ("nosuch://bucket/bundle.json", "Protocol not known: nosuch"),
        ("://", ""),
        ("http://", ""),
        ("http://[::1", ""),
        ("http://\x1b[31m/\n", ""),
        ("file://\0", ""),
    ],
)
def test_what_cannot_be_read(url: str, says: str) -> None:
    """One line that names the URL."""
    with pytest.raises(BundleError) as error:
        bundle.read(url)
    assert says in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "secret",
    ["me:hidden@127.0.0.1:1/a.json", "127.0.0.1:1/a.json?X-Amz-Signature=hidden&x=1"],
)
def test_errors_and_layers_tell_no_password(secret: str) -> None:
    """Neither the name of the place nor what the protocol says of it."""
    url = f"http://{secret}"
    told = [BundleLayer(url, "bundle").name]
    with pytest.raises(BundleError) as error:
        bundle.read(url, 5.0)
    told.append(str(error.value))
    with pytest.raises(BundleError) as error:
        files.write(url, TEXT, 5.0)
    told.append(str(error.value))
    with pytest.raises(BundleError) as error:
        BundleLayer(url, "bundle").keys()
    told.append(str(error.value))
    for text in told:
        assert "hidden" not in text
        assert "***" in text


def test_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds for every protocol."""
    files.write("memory://large.json", " " * 2**21)
    monkeypatch.setattr(json_text, "MOST_BYTES", 2**20)
    assert "a bundle has at most 1 MiB; this has more" in refused("memory://large.json")


def test_without_fsspec() -> None:
    """It is optional: the error says how to get it, and paths go without."""
    code = """
import sys
sys.modules["fsspec"] = None
from autochunk.errors import BundleError
from autochunk.store import bundle, files
try:
    bundle.read("https://example.org/a.json")
except BundleError as error:
    print(error)
try:
    files.write("s3://bucket/a.json", "text")
except BundleError as error:
    print(error)
files.write("-", bundle.dump([])[:1])
"""
    cure = 'URLs need fsspec, which is not installed: pip install "autochunk[remote]"'
    refusals = [f"{url}: {cure}" for url in ("https://example.org/a.json", "s3://bucket/a.json")]
    assert run_python(code).splitlines() == [*refusals, "{"]


@pytest.mark.parametrize(
    ("protocol", "package"),
    [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs"), ("sftp", "paramiko")],
)
def test_without_a_protocols_package(protocol: str, package: str) -> None:
    """The error names it."""
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    message = refused(f"{protocol}://host/bundle.json")
    assert "this protocol needs a package that is not installed" in message
    assert 'pip install "autochunk[remote]"' in message


def test_http_without_its_package() -> None:
    """Also of http, which the extra brings."""
    code = """
import sys
sys.modules["aiohttp"] = None
from autochunk.errors import BundleError
from autochunk.store import bundle, files
try:
    bundle.read("https://example.org/a.json")
except BundleError as error:
    print(error)
"""
    assert 'pip install "autochunk[remote]" brings that of http' in run_python(code)


def test_paths_need_no_fsspec(tmp_path: Path) -> None:
    """Nor is it loaded for them."""
    code = """
import sys
from autochunk.store import bundle, files
files.write(sys.argv[1], bundle.dump([]))
bundle.read(sys.argv[1])
print("fsspec" in sys.modules)
"""
    assert run_python(code, tmp_path / "bundle.json") == "False\n"


def test_is_url() -> None:
    """Anything else is a path."""
    assert all(map(remote.is_url, ("s3://a", "file:///a")))
    assert not any(map(remote.is_url, ("/a/b", "a:b", "C:/a", "-", "a//b")))
