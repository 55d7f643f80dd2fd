"""Places: where systemd, podman and docker keep credentials, for one user in one environment."""

import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

#: The systemd credential that is read without being named in the configuration.
SYSTEMD_NAME = "registry-auth"


@dataclass(frozen=True, slots=True)
class Place:
    """One file that may hold credentials."""

    #: Whose it is, or the variable that names it.
    source: str
    #: None: the variable that would lead to it is not set.
    path: Path | None
    variable: str = ""
    #: Nothing but credentials, as docker before 1.7 wrote.
    flat: bool = False
    #: Somebody named this very file, or its folder.
    is_asked_for: bool = False

    @property
    def where(self) -> str:
        """The place as a message shows it."""
        return str(self.path or self.variable)


def systemd_place(environ: Mapping[str, str]) -> Place:
    """What a service is given by `LoadCredential=registry-auth:FILE`."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    path = Path(folder) / SYSTEMD_NAME if folder else None
    return Place("systemd", path, variable="CREDENTIALS_DIRECTORY")


def file_places(environ: Mapping[str, str], home: Path | None, uid: int, run: Path) -> list[Place]:
    """The others' files, in containers-auth.json(5)'s order; one that REGISTRY_AUTH_FILE names stands alone."""
    named = environ.get("REGISTRY_AUTH_FILE")
    if named:
        return [Place("REGISTRY_AUTH_FILE", Path(named), is_asked_for=True)]
    runtime = environ.get("XDG_RUNTIME_DIR")
    places = [
        Place("REGISTRY_AUTH_FILE", None),
        Place(
            "podman", (Path(runtime) / "containers" if runtime else run / f"containers/{uid}") / "auth.json"
        ),
    ]
    config = environ.get("XDG_CONFIG_HOME") or (home and home / ".config")
    if config:
        places.append(Place("podman", Path(config) / "containers/auth.json"))
    docker = docker_config(environ, home)
    if docker:
        places.append(Place("docker", docker, is_asked_for=bool(environ.get("DOCKER_CONFIG"))))
    if home:
        places.append(Place("docker", home / ".dockercfg", flat=True))
    return places


def docker_config(environ: Mapping[str, str], home: Path | None) -> Path | None:
    """The file of `docker login`; None for a user without a home."""
    folder = environ.get("DOCKER_CONFIG") or (home and home / ".docker")
    return Path(folder) / "config.json" if folder else None


def home_folder(environ: Mapping[str, str], uid: int) -> Path | None:
    """The home of a user, also where HOME is unset, as it is for services; None if there is none."""
    if environ.get("HOME"):
        return Path(environ["HOME"])
    try:
        return Path(pwd.getpwuid(uid).pw_dir)
    except KeyError:
        return None
