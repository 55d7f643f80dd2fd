"""certs.d: which folder holds the certificates for a server, and what each file in it is for."""

import logging
from functools import lru_cache
from pathlib import Path

from fsmount.errors import UsageError
from fsmount.registry.endpoint import ClientCertificate, Tls

_log = logging.getLogger(__name__)


def folders(root: Path, home: Path, host: str) -> tuple[Path, ...]:
    """Where podman and docker keep what concerns a server (`host[:port]`): the first that exists counts."""
    certs = home / ".config/containers", root / "etc/containers", root / "etc/docker"
    return tuple(folder / "certs.d" / host for folder in certs)


@lru_cache  # of a folder that has not changed nothing is logged twice
def parse(folder: Path, names: tuple[str, ...], *, joined: bool = False) -> Tls:
    """What the files of a folder are for, by their names in order (containers-certs.d(5)).

    `*.crt` are authorities; `NAME.cert` and `NAME.key` are who we are. joined: a `.cert` without a `.key`
    holds the key as well, as containerd has it; elsewhere it is taken for an authority under a wrong name.

    Raises: UsageError.
    """
    authorities = tuple(folder / name for name in names if name.endswith(".crt"))
    certificates = [name for name in names if name.endswith(".cert")]
    keys = {name for name in names if name.endswith(".key")}
    if not joined:
        _check_pairs(folder, certificates, keys)
    clients = [_client(folder, name, keys) for name in certificates]
    if len(clients) > 1:
        _log.warning("%s holds several client certificates: only %s is used", folder, certificates[0])
    return Tls(authorities, clients[0] if clients else None)


def _client(folder: Path, name: str, keys: set[str]) -> ClientCertificate:
    key = _key_of(name)
    return ClientCertificate(folder / name, folder / key if key in keys else None)


def _check_pairs(folder: Path, certificates: list[str], keys: set[str]) -> None:
    for name in certificates:
        if _key_of(name) not in keys:
            raise UsageError(
                f"the client certificate {folder / name} has no key beside it",
                remedy=f"Put {_key_of(name)} there; if it is an authority's certificate, call it .crt.",
            )
    for key in sorted(keys - set(map(_key_of, certificates))):
        raise UsageError(
            f"the key {folder / key} has no client certificate beside it",
            remedy=f"Put {key.removesuffix('.key')}.cert there, or remove the key.",
        )


def _key_of(certificate: str) -> str:
    return certificate.removesuffix(".cert") + ".key"
