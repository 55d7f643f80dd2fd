"""Credentials: who we are at which registry, by the configuration and the files and programs that others use.

The places are asked in this order, and the first that has something for a registry is believed:

1. `[registries."host:port"]` of our configuration;
2. `registry-auth`, a file of docker's form that systemd hands over: `LoadCredential=registry-auth:FILE`;
3. `DOCKER_AUTH_CONFIG`, the same as a text;
4. the file that `REGISTRY_AUTH_FILE` names, and then no further one, be it there or not;
5. podman's: `$XDG_RUNTIME_DIR/containers/auth.json`, `~/.config/containers/auth.json`;
6. docker's `config.json`, and what older ones left as `~/.dockercfg`.

Within a file: the helper that `credHelpers` names for the registry, and nothing else if there is one; the longest
key of `auths`; the helper of all registries, `credsStore`. Other than skopeo 1.9 we read credsStore, plain
`username` and `password`, and tokens without `auth`; it goes on behind REGISTRY_AUTH_FILE, as later ones do not;
and where it takes a broken entry for none, we say so.
"""

import enum
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from fsmount import config as configuration
from fsmount.errors import FsmountError, UsageError
from fsmount.registry.authfile import AuthFile, helper_keys, normal_key
from fsmount.registry.credential import Credential, from_login
from fsmount.registry.helpers import Helpers
from fsmount.registry.places import Place, file_places, home_folder, systemd_place
from fsmount.registry.watched import WatchedFile

_log = logging.getLogger(__name__)


class Result(enum.Enum):
    """What a place had to say."""

    UNSET = "not set"
    ABSENT = "does not exist"
    NOTHING = "has nothing for it"
    USED = "is used"
    NOT_ASKED = "is not asked"


@dataclass(frozen=True, slots=True)
class Match:
    """What a place has for a repository; a credential of None is to be anonymous there, on purpose."""

    credential: Credential | None
    #: The part of the registry that it is for.
    key: str
    #: The program that has it; None is the place itself.
    helper: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One place, and what it had to say."""

    #: Who keeps it, or the variable that holds or names it.
    source: str
    #: What of it; empty for a variable.
    where: str
    result: Result


@dataclass(frozen=True, slots=True)
class Explanation:
    """All places in their order, and what came of them; a match of None: nobody has credentials."""

    steps: tuple[Step, ...]
    match: Match | None


#: Asks a place for a domain and a repository, perhaps afresh.
_Ask = Callable[[str, str, bool], Awaitable[Match | Result]]


class Credentials:
    """Finds the credential for a repository; what was changed meanwhile is noticed within seconds."""

    def __init__(
        self,
        registries: Mapping[str, configuration.Registry] = MappingProxyType({}),
        *,
        environ: Mapping[str, str] = os.environ,
        home: Path | None = None,
        uid: int | None = None,
        run: Path = Path("/run"),
    ) -> None:
        """registries: what the configuration says, by `host[:port]`.

        home is that of uid, and uid ours, unless they are given. Touches neither files nor programs.
        """
        uid = os.geteuid() if uid is None else uid
        home = home or home_folder(environ, uid)
        self._registries = registries
        self._environ = environ
        self._helpers = Helpers(environ, home)
        self._passwords: dict[Path, WatchedFile[str]] = {}
        self._warned: set[str] = set()
        #: Source, where it is, and how to ask it; in the order of asking.
        self._places: list[tuple[str, str, _Ask]] = [
            ("configuration", "[registries]", self._ask_configuration)
        ]
        self._add_file(systemd_place(environ))
        self._places.append(("DOCKER_AUTH_CONFIG", "", self._ask_variable))
        for place in file_places(environ, home, uid, run):
            self._add_file(place)

    async def find(self, domain: str, repository: str, *, fresh: bool = False) -> Credential | None:
        """The credential for a repository at `host[:port]`; None is anonymous.

        fresh: look at files and ask helpers again, even if that was done a moment ago; for use after a refusal.

        Raises: UsageError, naming the place, if it is broken or cannot be read; Unreachable, DeadlineExpired,
            if a helper fails.
        """
        match = (await self._search(domain, repository, fresh)).match
        return match.credential if match else None

    async def explain(self, domain: str, repository: str) -> Explanation:
        """How the credential for a repository is found. Raises: as find."""
        return await self._search(domain, repository, fresh=True)

    async def _search(self, domain: str, repository: str, fresh: bool) -> Explanation:
        domain = normal_key(domain)
        steps: list[Step] = []
        match: Match | None = None
        for source, where, ask in self._places:
            answer = Result.NOT_ASKED if match else await ask(domain, repository, fresh)
            if isinstance(answer, Match):
                match, answer = answer, Result.USED
            steps.append(Step(source, where, answer))
        return Explanation(tuple(steps), match)

    def _add_file(self, place: Place) -> None:
        path = place.path
        if path is None:
            self._places.append((place.source, place.where, _unset))
            return
        file = WatchedFile(
            path,
            lambda data: AuthFile.parse(data, str(path), flat=place.flat),
            has_secrets=lambda content: content.has_secrets,
            is_asked_for=place.is_asked_for,
        )

        async def ask(domain: str, repository: str, fresh: bool) -> Match | Result:
            content = await file.load(fresh=fresh)
            if content is None:
                return Result.ABSENT
            return await self._search_in(content, domain, repository, fresh)

        self._places.append((place.source, place.where, ask))

    async def _ask_configuration(self, domain: str, repository: str, fresh: bool) -> Match | Result:
        table = self._registries.get(domain)
        if table is None:
            return Result.NOTHING
        if table.anonymous:
            return Match(None, domain)
        if table.helper is not None:
            return await self._help(table.helper, domain, "the configuration", fresh)
        if table.username is not None and table.password_file is not None:
            password = await self._password(table.password_file, domain, fresh)
            return Match(from_login(table.username, password), domain)
        return Result.NOTHING

    async def _ask_variable(self, domain: str, repository: str, fresh: bool) -> Match | Result:
        """DOCKER_AUTH_CONFIG. Who set it is often not who runs us: what is broken in it counts as absent."""
        text = self._environ.get("DOCKER_AUTH_CONFIG")
        if not text:
            return Result.UNSET
        try:
            content = AuthFile.parse(text.encode(errors="surrogateescape"), "DOCKER_AUTH_CONFIG")
            return await self._search_in(content, domain, repository, fresh)
        except UsageError as error:
            self._warn(f"{error.message}: going on without")
            return Result.NOTHING

    async def _search_in(
        self, content: AuthFile, domain: str, repository: str, fresh: bool
    ) -> Match | Result:
        own = content.helpers.get(domain)
        if own:
            return await self._help(own, domain, content.origin, fresh)
        if found := content.find(domain, repository):
            return Match(found[1], found[0])
        if content.store and own is None:
            # It is for all registries: that it is missing on a server must not keep public images from it.
            if self._helpers.is_installed(content.store):
                return await self._help(content.store, domain, content.origin, fresh)
            self._warn(f"{content.origin} names docker-credential-{content.store}, which is not installed")
        return Result.NOTHING

    async def _help(self, helper: str, domain: str, origin: str, fresh: bool) -> Match | Result:
        for key in helper_keys(domain):
            try:
                credential = await self._helpers.get(helper, key, fresh=fresh)
            except FsmountError as error:
                raise type(error)(f"{origin}: {error.message}", remedy=error.remedy) from error
            if credential is not None:
                return Match(credential, key, f"docker-credential-{helper}")
        return Result.NOTHING

    async def _password(self, path: Path, domain: str, fresh: bool) -> str:
        """The content of a password file; a bare name is that of a systemd credential."""
        if not path.is_absolute():
            folder = self._environ.get("CREDENTIALS_DIRECTORY")
            if not folder:
                raise UsageError(
                    f"the password for {domain} is in the systemd credential {path}, and systemd gave us none",
                    remedy=f"Add LoadCredential={path}:FILE to the service, or write password_file as a full path.",
                )
            path = Path(folder) / path
        file = self._passwords.setdefault(path, WatchedFile(path, partial(_parse_password, path=path)))
        password = await file.load(fresh=fresh)
        if password is None:
            raise UsageError(f"the password for {domain} is to be in {path}, which does not exist")
        return password

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _log.warning("%s", text)


def _parse_password(data: bytes, *, path: Path) -> str:
    """The whole file but the end of its last line."""
    try:
        password = data.decode().removesuffix("\n").removesuffix("\r")
    except ValueError:
        password = ""
    if not password:
        raise UsageError(f"{path} holds no password: it must be one line of UTF-8")
    return password


async def _unset(domain: str, repository: str, fresh: bool) -> Match | Result:
    return Result.UNSET
