"""Endpoint: one server that may be asked for a repository, and how it is to be spoken to; a pure value."""

import enum
from dataclasses import dataclass, field
from pathlib import Path


class Capability(enum.Flag):
    """What an endpoint is asked for (containerd's hosts.md, "capabilities")."""

    #: Manifests by digest, and blobs.
    PULL = enum.auto()
    #: Manifests by tag.
    RESOLVE = enum.auto()
    PUSH = enum.auto()
    REFERRERS = enum.auto()
    ALL = PULL | RESOLVE | PUSH | REFERRERS


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """What we show a server that asks who we are: PEM files; a key of None is in the certificate's file."""

    certificate: Path
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class Tls:
    """Whom to trust beyond the system's store, and who we are."""

    authorities: tuple[Path, ...] = ()
    client: ClientCertificate | None = None
    #: False: any certificate will do, because the administrator said so.
    verify: bool = True


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server, and the name that the repository has there.

    `bases` are the URLs of its API in the order to try, each up to and including `/v2/` or what an administrator
    wrote in its place, with a final slash; the first that answers is kept: https, then http where that is
    permitted. Two endpoints are equal if requests to them are the same.
    """

    bases: tuple[str, ...]
    repository: str
    #: Whom to find credentials for, and to show in messages: `host[:port]`; `docker.io` for Docker Hub.
    domain: str
    capabilities: Capability = Capability.ALL
    #: Only the origin is believed when it says that something does not exist, or lists tags.
    is_origin: bool = False
    #: Sent as `?ns=`: a mirror of many registries cannot know otherwise whose repository is meant.
    namespace: str | None = None
    tls: Tls = Tls()
    #: Sent to this host alone, and a secret as far as messages are concerned.
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    #: Bound on connecting; None is the client's own.
    connect_seconds: float | None = None
    #: The file that describes it, for messages; None is the built-in rule.
    written_in: Path | None = field(default=None, compare=False)
