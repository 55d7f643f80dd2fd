"""Starts the real programs that fsmount is measured against, makes images, and lists trees for comparing."""

import base64
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sysconfig
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urljoin, urlsplit

import bcrypt
import trustme
import zstandard

# A manifest is whatever JSON a test wants to write, valid or not, so it stays a plain value here.
Json: TypeAlias = bool | int | str | list["Json"] | dict[str, "Json"] | None

OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
MANIFEST = OCI + "manifest.v1+json"
INDEX = OCI + "index.v1+json"
DOCKER_MANIFEST = DOCKER + "distribution.manifest.v2+json"
DOCKER_LIST = DOCKER + "distribution.manifest.list.v2+json"
TITLE = "org.opencontainers.image.title"


#: Where to look for programs; some are installed beside pytest.
_PATH = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))


def have(*programs: str) -> str:
    """Why to skip what needs `programs`, or "" when all are there: `if why := have("umoci"): skip(why)`."""
    missing = [program for program in programs if shutil.which(program, path=_PATH) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run to the end and return standard output.

    Raises: RuntimeError: it failed; the message holds the command and what it said.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


# -------------------- registries


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate for 127.0.0.1 and localhost, and the authority that signed it, as PEM files."""

    certificate: Path
    key: Path
    authority: Path


@dataclass(frozen=True, slots=True)
class TokenServer:
    """What a registry is told about the server whose tokens it accepts; `certificate` is its PEM bundle."""

    realm: str
    service: str
    issuer: str
    certificate: Path


@dataclass(frozen=True, slots=True)
class Request:
    """One line of a registry's access log; `written` counts body bytes, also of answers cut short."""

    method: str
    path: str
    status: int
    written: int


_LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")
_ACCESS = re.compile(r'"(\w+) (\S+) HTTP/[\d.]+" (\d+) (\d+)')


@dataclass(slots=True)
class Registry:
    """A running docker-registry; whoever has it may stop and start it again on the same port."""

    host: str
    root: Path
    scheme: str
    pid: int
    _process: subprocess.Popen[bytes]
    _work: Path
    _environment: Mapping[str, str]

    def requests(self) -> list[Request]:
        """All requests answered until now, oldest first. One is logged when its body has ended."""
        text = (self._work / "access.log").read_text(errors="replace")
        return [Request(m, path, int(status), int(n)) for m, path, status, n in _ACCESS.findall(text)]

    def stop(self) -> None:
        """End the process; connections break. Does nothing when it has ended."""
        _end(self._process)

    def start(self) -> None:
        """Start anew, on the same port with the same storage, after `stop`."""
        config = json.loads((self._work / "config.yml").read_text())
        config["http"]["addr"] = self.host
        (self._work / "config.yml").write_text(json.dumps(config))
        self._process, _ = _serve(self._work, self._environment)
        self.pid = self._process.pid


def loopback_tls(directory: Path) -> Tls:
    """Make an authority and a certificate for 127.0.0.1 and localhost in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    tls = Tls(directory / "server.crt", directory / "server.key", directory / "ca.crt")
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1", "localhost")
    authority.cert_pem.write_to_path(str(tls.authority))
    leaf.private_key_pem.write_to_path(str(tls.key))
    for number, pem in enumerate(leaf.cert_chain_pems):
        pem.write_to_path(str(tls.certificate), append=number > 0)
    return tls


@contextmanager
def docker_registry(
    root: Path,
    *,
    htpasswd: Mapping[str, str] | None = None,
    tls: Tls | None = None,
    token: TokenServer | None = None,
    proxy: str | None = None,
    redirect: str | None = None,
    read_only: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Registry]:
    """Run Debian's docker-registry over the storage folder `root` on a free loopback port.

    `htpasswd` maps users to passwords. `proxy` is the URL of the upstream that a pull-through cache reads.
    `redirect` is the base URL of a blob server: blobs answer 307 to it. Several may share a `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="docker-registry-") as folder:
        work = Path(folder)
        storage: dict[str, Json] = {
            "filesystem": {"rootdirectory": str(root)},
            "delete": {"enabled": True},
            "maintenance": {"readonly": {"enabled": read_only}},
        }
        http_: dict[str, Json] = {"addr": "127.0.0.1:0"}
        config: dict[str, Json] = {"version": "0.1", "storage": storage, "http": http_}
        if tls:
            http_["tls"] = {"certificate": str(tls.certificate), "key": str(tls.key)}
        if htpasswd:
            lines = (f"{user}:{_bcrypt(password)}\n" for user, password in htpasswd.items())
            (work / "htpasswd").write_text("".join(lines))
            config["auth"] = {"htpasswd": {"realm": "basic-realm", "path": str(work / "htpasswd")}}
        if token:
            fields_: dict[str, Json] = {
                "realm": token.realm,
                "service": token.service,
                "issuer": token.issuer,
            }
            config["auth"] = {"token": fields_ | {"rootcertbundle": str(token.certificate)}}
        if proxy:
            config["proxy"] = {"remoteurl": proxy}
        if redirect:
            options: Json = {"name": "redirect", "options": {"baseurl": redirect}}
            config["middleware"] = {"storage": [options]}
        (work / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        process, host = _serve(work, environment or {})
        registry = Registry(
            host, root, "https" if tls else "http", process.pid, process, work, environment or {}
        )
        try:
            yield registry
        finally:
            registry.stop()


def _serve(work: Path, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    log = work / "server.log"
    with (work / "access.log").open("ab") as out, log.open("wb") as errors:
        # A session of its own: a Ctrl-C at the terminal must not end it before those who use it.
        process = subprocess.Popen(
            ["docker-registry", "serve", str(work / "config.yml")],
            stdout=out,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        if found := _LISTENING.search(log.read_text(errors="replace")):
            return process, found[1]
        time.sleep(0.01)
    _end(process)
    raise RuntimeError(f"docker-registry did not start: {log.read_text(errors='replace')[-2000:]}")


@contextmanager
def zuul_registry(work: Path, users: Mapping[str, str]) -> Iterator[str]:
    """Run zuul-registry, all in the folder `work`, and yield its host; only `users` may read, and write.

    It ignores ranges, explains errors in HTML, and needs the media type in a manifest that is asked for by digest.
    """
    host = _free_host()
    address, port = host.split(":")
    entries: list[Json] = [
        {"name": name, "pass": password, "access": access}
        for name, password in users.items()
        for access in ("read", "write")  # without one who may read, everybody may
    ]
    storage: Json = {"driver": "filesystem", "root": str(work / "storage")}
    config: dict[str, Json] = {
        "address": address,
        "port": int(port),
        "public-url": f"http://{host}",
        "secret": "-",
    }
    config |= {"users": entries, "storage": storage}
    (work / "storage").mkdir(parents=True)
    (work / "registry.yaml").write_text(json.dumps({"registry": config}))  # JSON is YAML
    with _running(work, host, "zuul-registry", "-c", str(work / "registry.yaml"), "serve"):
        yield host


@contextmanager
def drayage(work: Path, upstream: str) -> Iterator[str]:
    """Run the pull-through cache drayage, all in the folder `work`, and yield `host/prefix`.

    What `upstream` (a URL) has as `a/b`, it has as `prefix/a/b`. It ignores ranges, and lists no tags.
    """
    host = _free_host()
    (work / "cache").mkdir(parents=True)
    lines = (
        f'listen = "{host}"',
        f'cache_dir = "{work}/cache"',
        "[upstreams.up_test]",
        f'registry = "{upstream}"',
    )
    (work / "config.toml").write_text("\n".join(lines))
    with _running(work, host, "drayage", "serve", "-c", str(work / "config.toml")):
        yield f"{host}/up.test"


def _free_host() -> str:
    """An address on this machine that nobody listens on, for programs that do not say which one they took."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def _running(work: Path, host: str, program: str, *arguments: str) -> Iterator[None]:
    """A server, from when it takes connections at `host`; `work` gets its log."""
    path = shutil.which(program, path=_PATH)
    if path is None:
        raise RuntimeError(f"{program} is not installed")
    log = work / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [path, *arguments], stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 20
        while not _listens(host):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{program} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield
    finally:
        _end(process)


def _listens(host: str) -> bool:
    address, port = host.split(":")
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def _bcrypt(password: str) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(5)).decode()


# -------------------- images by other people's tools


def skopeo_copy(source: str, dest: str, *flags: str) -> None:
    """`skopeo copy`, plain http allowed. It compresses plain tar layers when pushing: `push` does not."""
    insecure = ("--src-tls-verify=false", "--dest-tls-verify=false")
    run("skopeo", "--insecure-policy", "copy", "--quiet", *insecure, *flags, source, dest)


def umoci_layout(layout: Path, tag: str, *inserts: tuple[Path | None, str]) -> None:
    """An image that umoci made: one layer an insert (source, path in the image); no source: a whiteout."""
    if not layout.exists():
        run("umoci", "init", "--layout", layout)
    image = f"{layout}:{tag}"
    run("umoci", "new", "--image", image)
    for source, path in inserts:
        if source is None:
            run("umoci", "insert", "--image", image, "--whiteout", path)
        else:
            run("umoci", "insert", "--image", image, source, path)


def umoci_unpack(layout: Path, tag: str, dest: Path) -> Path:
    """Unpack as root, without the runtime bundle around it; returns `dest`, the root of the tree."""
    run("umoci", "raw", "unpack", "--image", f"{layout}:{tag}", dest)
    return dest


def buildah_image(
    layout: Path,
    tag: str,
    steps: Sequence[Callable[[Path], None]],
    *,
    work: Path,
    config: Sequence[str] = (),
    docker: bool = False,
) -> None:
    """An image from scratch that buildah made, as root: each step changes the tree it gets, and is a layer.

    Deleting in a step gives whiteouts. `config` are flags of `buildah config`. The vfs driver needs no
    overlay; changing the mounted tree instead of `buildah run` needs no isolation.
    `work` is where its storage lives meanwhile; it must not exist, and is removed.
    """
    store = ("--storage-driver", "vfs", "--root", str(work / "root"), "--runroot", str(work / "run"))
    if len(steps) < 1:
        raise ValueError("an image needs at least one step")
    base, form = "scratch", "docker" if docker else "oci"
    for number, step in enumerate(steps):
        container = run("buildah", *store, "from", "--pull-never", base).strip()
        step(Path(run("buildah", *store, "mount", container).strip()))
        last = number == len(steps) - 1
        if last and config:
            run("buildah", *store, "config", *config, container)
        base = f"localhost/step{number}"
        target = f"oci:{layout}:{tag}" if last else base
        flags = ("--quiet", "--disable-compression=false", "--format", form)
        run("buildah", *store, "commit", *flags, container, target)
        run("buildah", *store, "rm", container)
    shutil.rmtree(work)


# -------------------- images written by hand


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """A layer as it is stored: its bytes or the file with them. No `diff_id`: inflated to compute it."""

    content: bytes | Path
    media_type: str = OCI + "layer.v1.tar+gzip"
    diff_id: str | None = None
    annotations: tuple[tuple[str, str], ...] = ()

    def read(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


Packing: TypeAlias = Literal["gzip", "gzip-members", "tar", "zstd", "docker-gzip", "docker-tar"]


def pack(tar: bytes, packing: Packing = "gzip", *, level: int = 6, member_size: int = 65536) -> LayerBlob:
    """A tar as a layer blob, always the same; `gzip-members` begins a member every `member_size` bytes."""
    diff_id = digest_of(tar)
    if packing == "tar":
        return LayerBlob(tar, OCI + "layer.v1.tar", diff_id)
    if packing == "docker-tar":
        return LayerBlob(tar, DOCKER + "image.rootfs.diff.tar", diff_id)
    if packing == "zstd":
        blob = zstandard.ZstdCompressor(level=min(level, 19)).compress(tar)
        return LayerBlob(blob, OCI + "layer.v1.tar+zstd", diff_id)
    step = member_size if packing == "gzip-members" else max(len(tar), 1)
    members = (gzip.compress(tar[at : at + step], level, mtime=0) for at in range(0, max(len(tar), 1), step))
    docker = packing == "docker-gzip"
    media_type = DOCKER + "image.rootfs.diff.tar.gzip" if docker else OCI + "layer.v1.tar+gzip"
    return LayerBlob(b"".join(members), media_type, diff_id)


def tar_layer_image(
    layout: Path,
    tag: str | None,
    layers: Sequence[LayerBlob | bytes | Path],
    *,
    platform: str = "linux/amd64",
    docker: bool = False,
    config: Mapping[str, Json] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> dict[str, Json]:
    """Write an image of ready layer blobs into an OCI layout and return its descriptor, with the platform.

    Bytes or a path alone is an OCI gzip layer. `docker` gives the schema 2 types of manifest and config
    (layers have their own). Without a tag the manifest is stored and not listed: for `image_index`.
    """
    blobs = [layer if isinstance(layer, LayerBlob) else LayerBlob(layer) for layer in layers]
    os_, _, rest = platform.partition("/")
    architecture, _, variant = rest.partition("/")
    described: dict[str, Json] = {"architecture": architecture, "os": os_}
    if variant:
        described["variant"] = variant
    diff_ids: list[Json] = [blob.diff_id or digest_of(_inflate(blob)) for blob in blobs]
    body = described | {"config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}} | dict(config or {})
    config_type = DOCKER + "container.image.v1+json" if docker else OCI + "config.v1+json"
    manifest: dict[str, Json] = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST if docker else MANIFEST,
        "config": put_blob(layout, json.dumps(body).encode(), config_type),
        "layers": [_put_layer(layout, blob) for blob in blobs],
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    return put_manifest(layout, tag, manifest) | {"platform": described}


def image_index(
    layout: Path, tag: str | None, manifests: Sequence[Mapping[str, Json]], *, docker: bool = False
) -> dict[str, Json]:
    """An index (with `docker` a manifest list) over descriptors that `tar_layer_image` returned."""
    listed: list[Json] = [dict(descriptor) for descriptor in manifests]
    media_type = DOCKER_LIST if docker else INDEX
    return put_manifest(layout, tag, {"schemaVersion": 2, "mediaType": media_type, "manifests": listed})


def oras_artifact(
    layout: Path, tag: str | None, files: Mapping[str, bytes | Path], *, artifact_type: str | None = None
) -> dict[str, Json]:
    """What `oras push` writes: a layer a title; a folder is a tar+gzip of members below its title."""
    layers: list[Json] = []
    for title, source in files.items():
        if isinstance(source, Path) and source.is_dir():
            tar = _oras_tar(source, title)
            layer = put_blob(layout, gzip.compress(tar, mtime=0), OCI + "layer.v1.tar+gzip")
            notes: dict[str, Json] = {"io.deis.oras.content.digest": digest_of(tar)}
            notes |= {"io.deis.oras.content.unpack": "true", TITLE: title}
        else:
            content = source.read_bytes() if isinstance(source, Path) else source
            layer = put_blob(layout, content, OCI + "layer.v1.tar")
            notes = {TITLE: title}
        layers.append(layer | {"annotations": notes})
    empty = put_blob(layout, b"{}", "application/vnd.oci.empty.v1+json")
    manifest: dict[str, Json] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type or "application/vnd.unknown.artifact.v1",
        "config": empty | {"data": base64.b64encode(b"{}").decode()},
        "layers": layers,
        "annotations": {"org.opencontainers.image.created": "2026-01-01T00:00:00Z"},
    }
    return put_manifest(layout, tag, manifest)


class _OrasMember(tarfile.TarInfo):
    """oras, alone among writers, leaves the slash off the names of folders."""

    def get_info(self) -> dict[str, str | bytes | int | Mapping[str, str]]:
        info: dict[str, str | bytes | int | Mapping[str, str]] = dict(super().get_info())
        return info | {"name": str(info["name"]).rstrip("/")}


def _oras_tar(folder: Path, title: str) -> bytes:
    def owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, tarinfo=_OrasMember) as tar:
        tar.add(folder, title, filter=owned_by_root)
    return out.getvalue()


def put_blob(layout: Path, content: bytes | Path, media_type: str) -> dict[str, Json]:
    """Store a blob in an OCI layout, made at need, and return its descriptor. A file is linked in."""
    _init(layout)
    digest = digest_of(content)
    path = layout / "blobs/sha256" / digest.removeprefix("sha256:")
    if not path.exists():
        if isinstance(content, Path):
            try:
                path.hardlink_to(content)
            except OSError:
                shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
    return {"mediaType": media_type, "digest": digest, "size": path.stat().st_size}


def put_manifest(layout: Path, tag: str | None, manifest: Mapping[str, Json]) -> dict[str, Json]:
    """Store a manifest, make `tag` its name if there is one, and return its descriptor."""
    descriptor = put_blob(layout, json.dumps(manifest).encode(), str(manifest["mediaType"]))
    if tag is not None:
        index = json.loads((layout / "index.json").read_text())
        name = "org.opencontainers.image.ref.name"
        others = [old for old in index["manifests"] if old.get("annotations", {}).get(name) != tag]
        index["manifests"] = [*others, descriptor | {"annotations": {name: tag}}]
        (layout / "index.json").write_text(json.dumps(index))
    return descriptor


def _init(layout: Path) -> None:
    if not (layout / "index.json").exists():
        (layout / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        (layout / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []})
        )


def _put_layer(layout: Path, blob: LayerBlob) -> dict[str, Json]:
    descriptor = put_blob(layout, blob.content, blob.media_type)
    return descriptor | {"annotations": dict(blob.annotations)} if blob.annotations else descriptor


def _inflate(blob: LayerBlob) -> bytes:
    content, out = blob.read(), []
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        return zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(content)
    if not content.startswith(b"\x1f\x8b"):
        return content
    while content.startswith(b"\x1f\x8b"):
        member = zlib.decompressobj(31)
        out.append(member.decompress(content))
        content = member.unused_data
    return b"".join(out)


def digest_of(content: bytes | Path) -> str:
    """`sha256:…` of bytes or of a file, which is read in pieces."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def push(layout: Path, tag: str, host: str, repository: str, *, as_tag: str | None = None) -> str:
    """Push what `tag` names, and all below it, byte for byte over plain http; returns the manifest's digest.

    skopeo re-encodes some images and refuses others (artifacts, odd media types); a test wants what it wrote.
    """
    index = json.loads((layout / "index.json").read_text())
    name = "org.opencontainers.image.ref.name"
    top = next(entry for entry in index["manifests"] if entry.get("annotations", {}).get(name) == tag)
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        _push_manifest(connection, layout, repository, top, as_tag or tag)
    finally:
        connection.close()
    return str(top["digest"])


def _push_manifest(
    connection: http.client.HTTPConnection, layout: Path, repository: str, top: Mapping[str, str], name: str
) -> None:
    body = _blob_path(layout, top["digest"]).read_bytes()
    manifest = json.loads(body)
    for child in manifest.get("manifests", []):
        _push_manifest(connection, layout, repository, child, child["digest"])
    for blob in [manifest[key] for key in ("config",) if key in manifest] + manifest.get("layers", []):
        path = f"/v2/{repository}/blobs/{blob['digest']}"
        if _exchange(connection, "HEAD", path, None, (200, 404)).status == 404:
            started = _exchange(connection, "POST", f"/v2/{repository}/blobs/uploads/", None, (202,))
            url = urlsplit(urljoin(f"http://{connection.host}/", started.headers["Location"]))
            target = f"{url.path}?{url.query}&digest={blob['digest']}"
            _exchange(connection, "PUT", target, _blob_path(layout, blob["digest"]), (201,))
    headers = {"Content-Type": str(top["mediaType"])}  # umoci's manifests do not say it themselves
    _exchange(connection, "PUT", f"/v2/{repository}/manifests/{name}", body, (201,), headers)


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | Path | None,
    expected: Collection[int],
    headers: Mapping[str, str] | None = None,
) -> http.client.HTTPResponse:
    headers = {"Content-Type": "application/octet-stream", **(headers or {})}
    if isinstance(body, Path):
        with body.open("rb") as file:
            length = str(body.stat().st_size)
            connection.request(method, path, file, {**headers, "Content-Length": length})
            response = connection.getresponse()
    else:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
    said = response.read()
    if response.status not in expected:
        raise RuntimeError(f"{method} {path.partition('?')[0]}: {response.status} {said[:500]!r}")
    return response


def _blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs/sha256" / digest.removeprefix("sha256:")


# -------------------- comparing trees


@dataclass(frozen=True, slots=True)
class Node:
    """All that two copies of a file must agree on. A field that was left out has the value it has here."""

    kind: Literal["file", "folder", "link", "char", "block", "fifo", "socket"]
    mode: int = 0
    uid: int = 0
    gid: int = 0
    #: Of files and links only.
    size: int = 0
    mtime_ns: int = 0
    target: bytes | None = None
    rdev: int = 0
    #: The sorted paths inside the tree that share the inode; empty for folders.
    links: tuple[bytes, ...] = ()
    sha256: str | None = None
    xattrs: tuple[tuple[str, bytes], ...] = ()


_KINDS: Mapping[int, Literal["file", "folder", "link", "char", "block", "fifo", "socket"]] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def tree_listing(root: Path, *, leave_out: Collection[str] = ()) -> dict[bytes, Node]:
    """Every node of a folder by its path in it, `b"."` for itself; no link is followed, no depth too great.

    `leave_out` names fields of `Node` not to look at; without "sha256" no content is read.
    """
    unknown = set(leave_out) - {field.name for field in fields(Node)}
    if unknown or "kind" in leave_out:
        raise ValueError(f"cannot leave out {sorted(leave_out)}")
    nodes: dict[bytes, Node] = {}
    same: dict[tuple[int, int], list[bytes]] = {}
    start = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        nodes[b"."] = _node(start, b".", os.fstat(start), leave_out)
        waiting = [b""]
        while waiting:
            folder = waiting.pop()
            fd = _open_below(start, folder)
            try:
                with os.scandir(fd) as entries:
                    names = sorted(os.fsencode(entry.name) for entry in entries)
                for name in names:
                    path = folder + b"/" + name if folder else name
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    nodes[path] = _node(fd, name, status, leave_out)
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(path)
                    else:
                        same.setdefault((status.st_dev, status.st_ino), []).append(path)
            finally:
                os.close(fd)
    finally:
        os.close(start)
    if "links" not in leave_out:
        for paths in same.values():
            group = tuple(sorted(paths))
            for path in paths:
                nodes[path] = replace(nodes[path], links=group)
    return nodes


def differences(left: Mapping[bytes, Node], right: Mapping[bytes, Node], *, limit: int = 20) -> list[str]:
    """What two listings do not agree on, one line each; empty when they are equal."""
    lines = []
    for path in sorted(left.keys() | right.keys()):
        one, other = left.get(path), right.get(path)
        if one is None or other is None:
            lines.append(f"{path!r}: only on the {'right' if one is None else 'left'}")
        elif one != other:
            parts = [(f.name, getattr(one, f.name), getattr(other, f.name)) for f in fields(Node)]
            lines.append(f"{path!r}: " + ", ".join(f"{n} {a!r} ≠ {b!r}" for n, a, b in parts if a != b))
    return lines[:limit] + ([f"… and {len(lines) - limit} more"] if len(lines) > limit else [])


def _open_below(start: int, path: bytes) -> int:
    """Open a folder in hops shorter than PATH_MAX: a tree may be deeper than any path the kernel takes."""
    fd, parts = os.dup(start), path.split(b"/") if path else []
    while parts:
        size = hop = 0
        while hop < len(parts) and size + len(parts[hop]) + 1 < 4000:
            size += len(parts[hop]) + 1
            hop += 1
        try:
            next_fd = os.open(b"/".join(parts[:hop]), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        finally:
            os.close(fd)
        fd, parts = next_fd, parts[hop:]
    return fd


def _node(fd: int, name: bytes, status: os.stat_result, leave_out: Collection[str]) -> Node:
    kind = _KINDS[stat.S_IFMT(status.st_mode)]

    def wanted(field: str, *kinds: str) -> bool:
        return field not in leave_out and (not kinds or kind in kinds)

    return Node(
        kind,
        mode=stat.S_IMODE(status.st_mode) if wanted("mode") else 0,
        uid=status.st_uid if wanted("uid") else 0,
        gid=status.st_gid if wanted("gid") else 0,
        size=status.st_size if wanted("size", "file", "link") else 0,
        mtime_ns=status.st_mtime_ns if wanted("mtime_ns") else 0,
        target=os.readlink(name, dir_fd=fd) if wanted("target", "link") else None,
        rdev=status.st_rdev if wanted("rdev", "char", "block") else 0,
        sha256=_content(fd, name) if wanted("sha256", "file") else None,
        xattrs=_xattrs(fd, name) if wanted("xattrs") else (),
    )


def _content(fd: int, name: bytes) -> str:
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=fd), "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _xattrs(fd: int, name: bytes) -> tuple[tuple[str, bytes], ...]:
    path = b"/proc/self/fd/%d/%s" % (fd, name)  # there is no dir_fd for these calls
    try:
        names = os.listxattr(path, follow_symlinks=False)
        return tuple((key, os.getxattr(path, key, follow_symlinks=False)) for key in sorted(names))
    except OSError:
        return ()
