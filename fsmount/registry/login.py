"""Logins: a user and password are shown to a registry, kept where others find them, and forgotten again."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path

import httpx

from fsmount.errors import AccessDenied, UsageError
from fsmount.oci.reference import Reference
from fsmount.registry import authfile
from fsmount.registry.auth import Access
from fsmount.registry.credential import Credential
from fsmount.registry.credentials import Credentials
from fsmount.registry.helpers import Helpers
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from fsmount.registry.places import docker_config, home_folder


async def check_login(
    domain: str,
    username: str,
    password: str,
    *,
    plain_http: bool = False,
    transport: httpx.AsyncBaseTransport | None = None,
) -> bool:
    """Show a login to a registry; False if the registry asked for none, so that it was not checked.

    transport replaces the network, for tests.

    Raises: AccessDenied; Unreachable and its kinds, Refused, UsageError (no registry's name).
    """
    login = _Login(domain, username, password)
    hosts = Hosts(plain_http=frozenset({domain} if plain_http else ()))
    async with Sources(hosts=hosts, credentials=login, transport=transport) as sources:
        # Of any repository: a rule for a mirror may need a name to rewrite.
        remotes = await sources.remotes(Reference(domain, "any"))
        server = next(remote for remote in remotes if remote.endpoint.is_origin).server
        try:
            # Of a registry with tokens, this asks for one without a scope: it proves who we are, and no more.
            answer = await server.send("GET", "", access=Access(""), what=domain)
            if answer.status != 200:
                raise await answer.error(domain)
            await answer.settle()
        except AccessDenied as error:
            raise AccessDenied(
                f"{domain} does not take this user name and password",
                remedy="Nothing was written. Where an account has two factors, an access token is the password.",
            ) from error
    return login.was_asked_for


class LoginFile:
    """The file that logins are written to, or that names the helper which keeps them."""

    def __init__(self, path: Path | None, *, environ: Mapping[str, str] = os.environ) -> None:
        """Without a path it is docker's. Raises: UsageError, if there is none."""
        home = home_folder(environ, os.geteuid())
        found = path or docker_config(environ, home)
        if found is None:
            raise UsageError(
                "there is no home folder to keep credentials in", remedy="Name a file: --authfile"
            )
        self.path = found
        self._helpers = Helpers(environ, home)

    def keeper(self, domain: str) -> str | None:
        """The helper that keeps the logins of a registry; None is the file itself. Raises: UsageError."""
        return authfile.load(self.path).helper(domain)

    async def keep(self, domain: str, username: str, password: str) -> None:
        """Keep a login in place of another. Raises: FsmountError."""
        helper = self.keeper(domain)
        if helper:
            await self._helpers.store(helper, authfile.helper_keys(domain)[0], username, password)
        authfile.put(self.path, domain, None if helper else (username, password))

    async def forget(self, domain: str) -> list[str]:
        """Erase what there is for a registry; returns where that was. Raises: FsmountError."""
        places = []
        helper = self.keeper(domain)
        for key in authfile.helper_keys(domain) if helper else ():
            assert helper is not None
            if await self._helpers.get(helper, key) is not None:
                await self._helpers.erase(helper, key)
                places.append(f"docker-credential-{helper}, key {key}")
        places += [f"{self.path}, key {key}" for key in authfile.remove(self.path, domain)]
        return places


class _Login(Credentials):
    """Only this login, in the form in which it will be read back."""

    def __init__(self, domain: str, username: str, password: str) -> None:
        auth = base64.b64encode(f"{username}:{password}".encode()).decode("ascii")
        # A mapping of ours, that no process inherits.
        super().__init__(environ={"DOCKER_AUTH_CONFIG": json.dumps({"auths": {domain: {"auth": auth}}})})
        self.was_asked_for = False

    async def find(self, domain: str, repository: str, *, fresh: bool = False) -> Credential | None:
        self.was_asked_for = True
        return await super().find(domain, repository, fresh=fresh)
