"""registries.conf and certs.d mean the same to fsmount and to skopeo: whom to ask, in which order, trusting whom."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from fsmount.errors import AccessDenied, UsageError
from fsmount.oci.reference import Reference
from fsmount.registry.endpoint import Capability
from fsmount.registry.hosts import Hosts
from tests import peers

#: As ordinary users we may still do it as the root of a namespace of our own.
_UNSHARE = ["unshare", "--mount", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
_LINES = re.compile(
    r'Trying to access \\"(?P<name>[^"\\]+)\\"'
    r'|TLS certificates and private keys in (?P<folder>[^"]+)"'
    r'|msg="GET (?P<base>\S+/v2/)"'
)


@cache
def _why_not() -> str:
    if why := peers.have("skopeo", "unshare"):
        return why
    done = subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "namespaces cannot be made here"


pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]

DIGEST = f"sha256:{'a' * 64}"
SYSTEM, USER = "etc/containers", "home/.config/containers"


@dataclass(slots=True)
class Attempt:
    """A server that is tried: the name that the image has there, the URLs, and the folder of certificates."""

    name: str
    bases: list[str] = field(default_factory=list)
    folder: str | None = None


def made(root: Path, files: Mapping[str, str]) -> Path:
    for folder in ("etc/containers", "home"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def by_skopeo(root: Path, reference: str, *options: str) -> list[Attempt]:
    """What skopeo tries, where `root/etc` is /etc and there is no network.

    Raises: UsageError: it cannot read its files.
    """
    script = 'mount --bind "$1" /etc && shift && exec skopeo "$@"'
    command = ["sh", "-c", script, "sh", f"{root}/etc", *options, "--debug", "inspect", "--raw"]
    done = subprocess.run(
        [*_UNSHARE, *command, f"docker://{reference}"],
        env={"PATH": os.environ["PATH"], "HOME": f"{root}/home", "XDG_RUNTIME_DIR": f"{root}/home"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    attempts: list[Attempt] = []
    for match in _LINES.finditer(done.stderr):
        if match["name"]:
            attempts.append(Attempt(match["name"]))
        elif match["base"]:
            attempts[-1].bases.append(match["base"])
        else:
            path = Path(match["folder"].replace("/etc/", f"{root}/etc/", 1))
            # It names the last one where there is none.
            attempts[-1].folder = os.fspath(path.relative_to(root)) if path.is_dir() else None
    if not attempts:
        fatal = done.stderr[done.stderr.find("level=fatal") :]
        assert "loading registries" in fatal or "rewriting reference" in fatal, done.stderr
        raise UsageError(fatal)
    # It finds out that a name is blocked when it is about to try it.
    return [attempt for attempt in attempts if attempt.bases]


def by_us(root: Path, reference: str, environ: Mapping[str, str] | None = None) -> list[Attempt]:
    parsed = Reference.parse(reference)
    version = f"@{parsed.digest}" if parsed.digest else f":{parsed.tag}"
    needed = Capability.PULL if parsed.digest else Capability.RESOLVE
    hosts = Hosts(root=root, environ=environ or {}, home=root / "home")
    return [
        Attempt(
            f"{endpoint.domain}/{endpoint.repository}{version}",
            list(endpoint.bases),
            next((os.fspath(path.parent.relative_to(root)) for path in endpoint.tls.authorities), None),
        )
        for endpoint in hosts.endpoints(parsed.domain, parsed.repository)
        if needed in endpoint.capabilities
    ]


def rule(location: str, *lines: str, mirrors: tuple[str, ...] = ()) -> str:
    return "\n".join(
        [
            f'[[registry]]\nlocation = "{location}"',
            *lines,
            *(f'[[registry.mirror]]\nlocation = "{mirror}"' for mirror in mirrors),
            "",
        ]
    )


MIRRORED = rule("r.example", mirrors=("z.example", "a.example:5000/proj"))
MOVED = rule("internal.example/x", 'prefix = "r.example/team"', mirrors=("m.example",))
NESTED = "".join(
    rule(f"{number}.example", f'prefix = "{prefix}"')
    for number, prefix in enumerate(
        ("r.example", "r.example/team", "r.example/team/web/x", "*.example", "a.r.example", "*.r.example")
    )
)
INSECURE = rule("r.example", "insecure = true", mirrors=("m.example",)) + "insecure = true\n"
BY_DIGEST = rule("r.example", "mirror-by-digest-only = true", mirrors=("m.example", "n.example"))
DIGEST_ONLY = rule("r.example", mirrors=("m.example",)) + 'pull-from-mirror = "digest-only"\n'
TAG_ONLY = rule("r.example", mirrors=("m.example",)) + 'pull-from-mirror = "tag-only"\n'
WILDCARD = '[[registry]]\nprefix = "*.example"\n[[registry.mirror]]\nlocation = "m.test/x"\n'
HUB = rule("docker.io", mirrors=("m.example/hub",))
LIBRARY = rule("m.example/lib", 'prefix = "docker.io/library"')
BLOCKED = rule("r.example", mirrors=("b.example", "m.example")) + rule("b.example", "blocked = true")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("", "r.example/a:v1"),
        ("", "r.example:5000/a:v1"),
        ("", f"r.example/a@{DIGEST}"),
        ("", "docker.io/library/web:v1"),
        (MIRRORED, "r.example/team/web:v1"),
        (MIRRORED, f"r.example/team/web@{DIGEST}"),
        (MIRRORED, "sub.r.example/web:v1"),
        (MOVED, "r.example/team/web:v1"),
        (MOVED, "r.example/teams/web:v1"),
        (NESTED, "r.example/team/web:v1"),
        (NESTED, "r.example/team/web/x/y:v1"),
        (NESTED, "r.example/other:v1"),
        (NESTED, "s.example/other:v1"),
        (NESTED, "a.r.example/other:v1"),
        (NESTED, "b.r.example:5000/other:v1"),
        (INSECURE, "r.example/a:v1"),
        (BY_DIGEST, "r.example/a:v1"),
        (BY_DIGEST, f"r.example/a@{DIGEST}"),
        (DIGEST_ONLY, "r.example/a:v1"),
        (DIGEST_ONLY, f"r.example/a@{DIGEST}"),
        (TAG_ONLY, "r.example/a:v1"),
        (WILDCARD, "r.example/a:v1"),
        (WILDCARD, "a.b.example/a:v1"),
        (WILDCARD, "example/a:v1"),
        (HUB, "docker.io/library/web:v1"),
        (HUB, "docker.io/team/web:v1"),
        (LIBRARY, "docker.io/library/web:v1"),
        (LIBRARY, "docker.io/team/web:v1"),
        (BLOCKED, "r.example/a:v1"),
        (rule("r.example") + rule("x.example", 'prefix = "r.example"'), "r.example/a:v1"),
        (rule("r.example/"), "r.example/a:v1"),
    ],
)
def test_servers_are_asked_in_the_order_of_skopeo(tmp_path: Path, text: str, reference: str) -> None:
    root = made(tmp_path, {f"{SYSTEM}/registries.conf": text})
    assert by_us(root, reference) == by_skopeo(root, reference)


FILES = {
    f"{SYSTEM}/registries.conf": rule("r.example", mirrors=("0.example",)),
    f"{SYSTEM}/registries.conf.d/10.conf": rule("r.example", mirrors=("1.example",)),
    f"{SYSTEM}/registries.conf.d/9.conf": rule("r.example", mirrors=("2.example",)),
    f"{SYSTEM}/registries.conf.d/a.conf.bak": rule("r.example", mirrors=("3.example",)),
    f"{USER}/registries.conf.d/0.conf": rule("r.example/x", mirrors=("4.example",)),
    f"{USER}/registries.conf": rule("r.example/y", mirrors=("5.example",)),
}


@pytest.mark.parametrize("count", range(1, len(FILES) + 1))
@pytest.mark.parametrize("reference", ["r.example/a:v1", "r.example/x/a:v1", "r.example/y/a:v1"])
def test_files_overrule_each_other_as_for_skopeo(tmp_path: Path, count: int, reference: str) -> None:
    root = made(tmp_path, dict(list(FILES.items())[:count]))
    assert by_us(root, reference) == by_skopeo(root, reference)


def test_a_file_that_is_named_stands_for_the_main_one_as_for_skopeo(tmp_path: Path) -> None:
    named = "named.conf"
    root = made(tmp_path, {**FILES, named: rule("r.example/z", mirrors=("6.example",))})
    for reference in ("r.example/a:v1", "r.example/x/a:v1", "r.example/y/a:v1", "r.example/z/a:v1"):
        ours = by_us(root, reference, {"CONTAINERS_REGISTRIES_CONF": f"{root}/{named}"})
        assert ours == by_skopeo(root, reference, "--registries-conf", f"{root}/{named}")


CERTS = [f"{USER}/certs.d", f"{SYSTEM}/certs.d", "etc/docker/certs.d"]


@pytest.mark.parametrize("folders", [CERTS, CERTS[1:], CERTS[2:], [CERTS[0], CERTS[2]], []])
@pytest.mark.parametrize("reference", ["r.example/a:v1", "r.example:5000/a:v1", "docker.io/library/web:v1"])
def test_certificates_are_taken_from_the_folder_that_skopeo_takes(
    tmp_path: Path, folders: list[str], reference: str
) -> None:
    hosts = ("r.example", "r.example:5000", "docker.io", "registry-1.docker.io", "m.example")
    # What is no certificate does not disturb skopeo.
    files = {f"{folder}/{host}/ca.crt": "none" for folder in folders for host in hosts}
    mirrored = rule("r.example", mirrors=("m.example", "n.example"))
    root = made(tmp_path, {**files, f"{SYSTEM}/registries.conf": mirrored})
    assert by_us(root, reference) == by_skopeo(root, reference)


@pytest.mark.parametrize("name", ["client.cert", "client.key"])
def test_half_a_pair_is_an_error_as_for_skopeo(tmp_path: Path, name: str) -> None:
    root = made(tmp_path, {f"etc/docker/certs.d/r.example/{name}": ""})
    with pytest.raises(UsageError, match=name):
        by_us(root, "r.example/a:v1")
    assert by_skopeo(root, "r.example/a:v1") == []


@pytest.mark.parametrize(
    "text",
    [
        "[[registry]",
        "registry = 1",
        "[[registry]]",
        "[[registry]]\nlocation = 1",
        '[[registry]]\nprefix = "r.example"',
        '[[registry]]\nprefix = "r.example"\nblocked = true',
        '[[registry]]\nprefix = "*.example/a"',
        '[[registry]]\nprefix = "*.example:5000"\nlocation = "x.example"',
        rule("https://r.example"),
        rule("r.example", 'insecure = "yes"'),
        rule("r.example", 'pull-from-mirror = "all"'),
        rule("r.example", mirrors=("http://m.example",)),
        rule("r.example") + "[[registry.mirror]]\ninsecure = true",
        rule("r.example", mirrors=("m.example",)) + 'pull-from-mirror = "never"',
        BY_DIGEST + 'pull-from-mirror = "all"',
    ],
)
@pytest.mark.parametrize("name", ["registries.conf", "registries.conf.d/a.conf"])
def test_what_skopeo_does_not_accept_is_an_error(tmp_path: Path, text: str, name: str) -> None:
    root = made(tmp_path, {f"{SYSTEM}/{name}": text})
    with pytest.raises(UsageError):
        by_skopeo(root, "other.test/a:v1")
    with pytest.raises(UsageError, match=re.escape(name)):
        by_us(root, "other.test/a:v1")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (rule("mirror", 'prefix = "r.example"'), "r.example/a:v1"),
        (rule("docker.io", 'prefix = "r.example"'), "r.example/a:v1"),
        (rule("m.example/UP", 'prefix = "r.example"'), "r.example/a:v1"),
        (rule("r.example", mirrors=("mirror",)), "r.example/a:v1"),
        (MIRRORED, "r.example:5000/web:v1"),
        (MOVED, "r.example/team:v1"),
    ],
)
def test_what_leads_to_no_full_name_is_an_error_as_for_skopeo(
    tmp_path: Path, text: str, reference: str
) -> None:
    root = made(tmp_path, {f"{SYSTEM}/registries.conf": text})
    with pytest.raises(UsageError, match="rewriting reference"):
        by_skopeo(root, reference)
    with pytest.raises(UsageError, match=r"registries\.conf leads from"):
        by_us(root, reference)


# -------------------- where we differ, on purpose


def test_this_machine_may_do_without_tls_unasked(tmp_path: Path) -> None:
    root = made(tmp_path, {})
    (theirs,), (ours,) = (by(root, "localhost:5000/a:v1") for by in (by_skopeo, by_us))
    assert ours.bases == [*theirs.bases, "http://localhost:5000/v2/"]


def test_a_mirror_for_tags_is_also_asked_for_digests(tmp_path: Path) -> None:
    root = made(tmp_path, {f"{SYSTEM}/registries.conf": TAG_ONLY})
    theirs, ours = (by(root, f"r.example/a@{DIGEST}") for by in (by_skopeo, by_us))
    assert [attempt.name.partition("/")[0] for attempt in ours] == ["m.example", "r.example"]
    assert ours[1:] == theirs


@pytest.mark.parametrize(("location", "theirs"), [("r.example", 0), ("x.example", 1)])
def test_a_blocked_name_is_denied_also_where_it_leads_elsewhere(
    tmp_path: Path, location: str, theirs: int
) -> None:
    text = rule(location, 'prefix = "r.example"', "blocked = true")
    root = made(tmp_path, {f"{SYSTEM}/registries.conf": text})
    assert len(by_skopeo(root, "r.example/a:v1")) == theirs
    with pytest.raises(AccessDenied):
        by_us(root, "r.example/a:v1")


def test_version_1_is_not_read(tmp_path: Path) -> None:
    text = '[registries.insecure]\nregistries = ["r.example"]'
    root = made(tmp_path, {f"{SYSTEM}/registries.conf": text})
    assert by_skopeo(root, "r.example/a:v1")
    with pytest.raises(UsageError, match="version 1"):
        by_us(root, "r.example/a:v1")
