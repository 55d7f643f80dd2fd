"""The sources that the contract holds for: each serves the same images, made by other people's tools."""

import base64
import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import BasicConstraints, CertificateBuilder, Name, NameAttribute, random_serial_number
from cryptography.x509.oid import NameOID

from fsmount.errors import FsmountError, Invalid, NotFound, Unreachable
from tests import peers
from tests.fakes.registry import FakeRegistry, basic

USER, PASSWORD = "me", "pass:word"
REPOSITORY = "team/web"
SIGNATURE_TAG = f"sha256-{'a' * 64}.sig"


@dataclass(frozen=True, slots=True)
class Address:
    """How a source is named, and what its client needs: a trusted authority, a config.json, a fake."""

    text: str
    authority: Path | None = None
    config: Path = Path("/nonexistent/config.json")
    #: To be served in the process, through MockTransport or a socket.
    fake: FakeRegistry | None = None
    #: What makes the source what it was, for every test.
    renew: Callable[[], None] = lambda: None


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout by umoci, with an index, a tag of housekeeping and a layer of some megabytes."""
    if why := peers.have("umoci", "skopeo", "docker-registry"):
        pytest.skip(why)
    work = tmp_path_factory.mktemp("images")
    (work / "app").mkdir()
    (work / "app" / "data").write_bytes(secrets.token_bytes(3_000_000))
    (work / "app" / "text").write_text("text\n" * 1000)
    layout = work / "layout"
    peers.umoci_layout(layout, "v1", (work / "app" / "data", "/data"), (work / "app" / "text", "/text"))
    one = peers.tar_layer_image(layout, SIGNATURE_TAG, [peers.pack(b"\0" * 1024)])
    two = peers.tar_layer_image(layout, None, [peers.pack(b"\0" * 2048)], platform="linux/arm64")
    peers.image_index(layout, "many", [one, two])
    return layout


@contextmanager
def _stored(images: Path, root: Path) -> Iterator[None]:
    """Push all images into the storage of registries yet to come."""
    with peers.docker_registry(root) as registry:
        for tag in ("many", SIGNATURE_TAG):
            peers.push(images, tag, registry.host, REPOSITORY)
        # umoci's manifests have no type of their own, which `push` wants to copy.
        peers.skopeo_copy(f"oci:{images}:v1", f"docker://{registry.host}/{REPOSITORY}:v1")
    yield


def _config(folder: Path, host: str) -> Path:
    auth = {"auth": basic(USER, PASSWORD).removeprefix("Basic ")}
    path = folder / f"{host}.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({"auths": {host: auth}}))
    return path


# -------------------- the kinds of source


def _umoci(images: Path, work: Path, stack: ExitStack) -> Address:
    return Address(f"oci-layout:{images}")


def _skopeo(images: Path, work: Path, stack: ExitStack) -> Address:
    for tag in ("v1", SIGNATURE_TAG, "many"):
        peers.skopeo_copy(f"oci:{images}:{tag}", f"oci:{work / 'layout'}:{tag}", "--all")
    return Address(f"oci:{work / 'layout'}")


def _fake(images: Path, work: Path, stack: ExitStack) -> Address:
    fake = FakeRegistry()
    for path in (images / "blobs/sha256").iterdir():
        fake.put_blob(path.read_bytes())
    index = json.loads((images / "index.json").read_text())
    for entry in index["manifests"]:
        data = fake.blobs[entry["digest"]]
        tag = entry["annotations"]["org.opencontainers.image.ref.name"]
        fake.put_manifest(tag, data, entry["mediaType"])
        for child in json.loads(data).get("manifests", []):
            fake.put_manifest(None, fake.blobs[child["digest"]], child["mediaType"])
    return Address(f"{fake.host}/{REPOSITORY}", fake=fake)


def _plain(images: Path, work: Path, stack: ExitStack) -> Address:
    stack.enter_context(_stored(images, work / "root"))
    registry = stack.enter_context(peers.docker_registry(work / "root"))
    return Address(f"{registry.host}/{REPOSITORY}")


def _basic_tls(images: Path, work: Path, stack: ExitStack) -> Address:
    stack.enter_context(_stored(images, work / "root"))
    tls = peers.loopback_tls(work / "tls")
    registry = stack.enter_context(
        peers.docker_registry(work / "root", tls=tls, htpasswd={USER: PASSWORD}, read_only=True)
    )
    return Address(f"{registry.host}/{REPOSITORY}", tls.authority, _config(work, registry.host))


def _token(images: Path, work: Path, stack: ExitStack) -> Address:
    stack.enter_context(_stored(images, work / "root"))
    server = stack.enter_context(_token_server(work))
    registry = stack.enter_context(peers.docker_registry(work / "root", token=server))
    return Address(f"{registry.host}/{REPOSITORY}", config=_config(work, registry.host))


def _read_only(images: Path, work: Path, stack: ExitStack) -> Address:
    stack.enter_context(_stored(images, work / "root"))
    registry = stack.enter_context(peers.docker_registry(work / "root", read_only=True))
    return Address(f"{registry.host}/{REPOSITORY}")


def _redirecting(images: Path, work: Path, stack: ExitStack) -> Address:
    """With credentials, which must stay behind when a blob is fetched elsewhere."""
    stack.enter_context(_stored(images, work / "root"))
    store = stack.enter_context(_blob_server(work / "root"))
    registry = stack.enter_context(
        peers.docker_registry(work / "root", redirect=store, htpasswd={USER: PASSWORD})
    )

    @stack.callback
    def no_blob_came_from_the_registry_itself() -> None:
        blobs = {request.status for request in registry.requests() if "/blobs/" in request.path}
        assert blobs <= {307, 401, 404}

    return Address(f"{registry.host}/{REPOSITORY}", config=_config(work, registry.host))


def _cold_mirror(images: Path, work: Path, stack: ExitStack) -> Address:
    """It answers a range of what it does not hold with the whole."""
    mirror = _mirror(images, work, stack)

    def forget() -> None:
        mirror.stop()
        shutil.rmtree(mirror.root, ignore_errors=True)  # nothing was asked for, perhaps
        mirror.start()

    return Address(f"{mirror.host}/{REPOSITORY}", renew=forget)


def _warm_mirror(images: Path, work: Path, stack: ExitStack) -> Address:
    mirror = _mirror(images, work, stack)
    for tag in ("v1", SIGNATURE_TAG, "many"):
        source = f"docker://{mirror.host}/{REPOSITORY}:{tag}"
        peers.skopeo_copy(source, f"oci:{work / 'pulled'}:{tag}", "--all")
    # It stores what it has answered a little later.
    while len(_blobs(mirror.root)) < len(_blobs(work / "root")):
        time.sleep(0.01)
    return Address(f"{mirror.host}/{REPOSITORY}")


def _mirror(images: Path, work: Path, stack: ExitStack) -> peers.Registry:
    upstream = _plain(images, work, stack).text.removesuffix(f"/{REPOSITORY}")
    return stack.enter_context(peers.docker_registry(work / "mirror", proxy=f"http://{upstream}"))


def _blobs(root: Path) -> list[Path]:
    return list(root.glob("docker/registry/v2/blobs/sha256/*/*/data"))


def _zuul(images: Path, work: Path, stack: ExitStack) -> Address:
    if why := peers.have("zuul-registry"):
        pytest.skip(why)
    host = stack.enter_context(peers.zuul_registry(work / "zuul", {USER: PASSWORD}))
    # It serves no manifest by digest that does not say its own type, as umoci's do not.
    for tag, form in {"v1": "v2s2", SIGNATURE_TAG: "oci", "many": "oci"}.items():
        target = f"docker://{host}/{REPOSITORY}:{tag}"
        credentials = ("--dest-creds", f"{USER}:{PASSWORD}")
        peers.skopeo_copy(f"oci:{images}:{tag}", target, "--all", "--format", form, *credentials)
    return Address(f"{host}/{REPOSITORY}", config=_config(work, host))


def _drayage(images: Path, work: Path, stack: ExitStack) -> Address:
    if why := peers.have("drayage"):
        pytest.skip(why)
    upstream = _plain(images, work, stack).text.removesuffix(f"/{REPOSITORY}")
    base = stack.enter_context(peers.drayage(work / "drayage", f"http://{upstream}"))
    return Address(f"{base}/{REPOSITORY}")


KINDS: dict[str, Callable[[Path, Path, ExitStack], Address]] = {
    "layout of umoci": _umoci,
    "layout of skopeo": _skopeo,
    "fake through MockTransport": _fake,
    "fake through a socket": _fake,
    "docker-registry": _plain,
    "docker-registry with TLS and Basic": _basic_tls,
    "docker-registry with tokens": _token,
    "docker-registry, read-only": _read_only,
    "docker-registry that redirects": _redirecting,
    "docker-registry as a cold mirror": _cold_mirror,
    "docker-registry as a warm mirror": _warm_mirror,
    "zuul-registry": _zuul,
    "drayage": _drayage,
}


#: What a program does not do by its nature, however it is asked, and what its client is told instead.
EXCUSED: dict[tuple[str, str], tuple[type[FsmountError], str]] = {
    (kind, test): (Unreachable, "docker-registry 2.8 answers 500 where its upstream has no such manifest")
    for kind in ("docker-registry as a cold mirror", "docker-registry as a warm mirror")
    for test in (
        "test_a_digest_that_is_not_there_is_not_found",
        "test_a_manifest_that_is_not_there_is_not_found",
    )
} | {
    ("drayage", "test_tags_are_sorted_and_housekeeping_is_among_them"): (
        NotFound,
        "drayage passes no list of tags on",
    ),
    ("drayage", "test_an_index_leads_to_the_image_of_a_platform"): (
        Invalid,
        "drayage calls whatever it is asked for by digest a Docker manifest; skopeo refuses that too",
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those who are excused must fail as said."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            excuse = EXCUSED.get((str(item.callspec.params.get("kind")), item.originalname))
            if excuse:
                error = pytest.RaisesGroup(excuse[0], flatten_subgroups=True)
                item.add_marker(pytest.mark.xfail(reason=excuse[1], raises=error, strict=True))


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def address(kind: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    with ExitStack() as stack:
        yield KINDS[kind](images, tmp_path_factory.mktemp("source"), stack)


# -------------------- a token server that docker-registry believes, and a store that it sends to


@contextmanager
def _token_server(work: Path) -> Iterator[peers.TokenServer]:
    """ES256 tokens whose header carries the self-signed certificate that the registry trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    der, pem = _certificate(key)
    path = work / "tokens.pem"
    path.write_bytes(pem)
    service, issuer = "test-registry", "test-issuer"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            if self.headers.get("Authorization") != basic(USER, PASSWORD):
                self.send_error(401)
                return
            access = [_access(scope) for scope in query.get("scope", [])]
            now = int(time.time())
            claims: dict[str, object] = {
                "iss": issuer,
                "sub": USER,
                "aud": service,
                "jti": secrets.token_hex(8),
                "access": access,
            }
            claims["iat"], claims["nbf"], claims["exp"] = now, now - 10, now + 300
            token = jwt.encode(claims, key, algorithm="ES256", headers={"x5c": [der]})
            body = json.dumps({"token": token, "expires_in": 300}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _serving(Handler) as url:
        yield peers.TokenServer(f"{url}token", service, issuer, path)


@contextmanager
def _blob_server(root: Path) -> Iterator[str]:
    """The storage folder of a docker-registry as a store that knows ranges and, as Azure's, no Authorization."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "Authorization" in self.headers:
                self.send_error(400, "InvalidAuthenticationInfo")
                return
            data = (root / self.path.lstrip("/")).read_bytes()
            start, stop = 0, len(data)
            if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
            self.send_response(206 if found else 200)
            if found:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            with suppress(ConnectionError):  # who has read enough leaves
                self.wfile.write(data[start:stop])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with _serving(Handler) as url:
        yield url


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on this machine; its URL, with a final slash."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _access(scope: str) -> dict[str, object]:
    kind, _, rest = scope.partition(":")
    name, _, actions = rest.rpartition(":")
    return {"type": kind, "name": name, "actions": [a for a in actions.split(",") if a == "pull"]}


def _certificate(key: ec.EllipticCurvePrivateKey) -> tuple[str, bytes]:
    name = Name([NameAttribute(NameOID.COMMON_NAME, "tokens")])
    now = datetime.now(UTC)
    builder = CertificateBuilder(name, name, key.public_key(), random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    certificate = builder.add_extension(BasicConstraints(ca=True, path_length=None), critical=True).sign(
        key, hashes.SHA256()
    )
    der = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
    return der, certificate.public_bytes(serialization.Encoding.PEM)
