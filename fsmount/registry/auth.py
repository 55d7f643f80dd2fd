"""What to put into Authorization: challenges answered with credentials, and tokens kept until they expire."""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import trio

from fsmount.errors import AccessDenied, RateLimited, Refused, Unreachable
from fsmount.registry.challenge import BasicChallenge, BearerChallenge, Challenge
from fsmount.registry.credential import Credential, IdentityToken, Password, RegistryToken
from fsmount.registry.credentials import Credentials
from fsmount.registry.endpoint import Tls
from fsmount.registry.retry import RETRYABLE_STATUSES, Again, Retry, retry_after_seconds
from fsmount.registry.urls import follow, shown
from fsmount.registry.wire import Answer, Wire

# distribution's token specification: 60 s where nothing is said, and never less.
_SHORTEST_LIFE_SECONDS = 60.0
_LONGEST_LIFE_SECONDS = 86400.0
#: A token this near its end is not used any more: the request needs time too.
_EARLY_SECONDS = 10.0
#: A refused credential is not tried again for this long, or the account may get locked.
_REFUSED_SECONDS = 30.0
_CLIENT_ID = "fsmount"
_SCOPE = re.compile(r"[a-z]+(?:\([a-z]+\))?:[A-Za-z0-9._:/-]+:[a-z*]+(?:,[a-z*]+)*")
# What RFC 6750 allows in a header; anything else would be refused by h11, with the token in the message.
_BEARER = re.compile(r"[A-Za-z0-9._~+/-]+=*")


@dataclass(frozen=True, slots=True)
class Access:
    """What a request is allowed to do: to which repository of the server, and `pull` or `pull,push`.

    Without a repository a token only proves who we are.
    """

    repository: str
    actions: str = "pull"

    @property
    def scope(self) -> str:
        """The form of distribution's token specification."""
        return f"repository:{self.repository}:{self.actions}" if self.repository else ""


@dataclass(frozen=True, slots=True)
class _Key:
    """What a token is for; two requests with equal keys share it."""

    realm: str
    service: str | None
    credential: Credential | None
    scope: str


@dataclass(frozen=True, slots=True)
class _Token:
    authorization: str = field(repr=False)
    expires_at: float


@dataclass(frozen=True, slots=True)
class _Refusal:
    message: str
    until: float


class Authenticator:
    """The credentials, challenges and tokens of one registry."""

    def __init__(self, domain: str, wire: Wire, credentials: Credentials, retry: Retry, *, tls: Tls) -> None:
        self._domain = domain
        self._tls = tls
        self._wire = wire
        self._credentials = credentials
        self._retry = retry
        self._challenge: Challenge | None = None
        self._challenged_at = httpx.URL()
        #: Whether its token server did not answer: the registry may name another by now.
        self._in_doubt = False
        #: What was asked for beyond, or instead of, what we would have asked, by our own scope.
        self._further_scopes: dict[str, tuple[str, ...]] = {}
        self._tokens: dict[_Key, _Token] = {}
        self._refusals: dict[_Key, _Refusal] = {}
        self._locks: dict[_Key, trio.Lock] = {}

    async def authorization(self, access: Access) -> str | None:
        """The header for the next request; None if the registry has not asked for one, or we have none."""
        return await self._answer(access)

    async def after_refusal(
        self, status: int, challenge: Challenge | None, url: httpx.URL, access: Access, refused: str | None
    ) -> str | None:
        """The header for one more try after 401 or 403 at url; None if there is nothing new to say.

        After 403 only credentials that were changed in the meantime are new: some registries answer so
        when a password has expired.

        Raises: AccessDenied, or what keeps the token server from answering.
        """
        if status == 401:
            if challenge is not None:
                self._challenge, self._challenged_at = challenge, url
                self._in_doubt = False
            if isinstance(challenge, BearerChallenge):
                further = tuple(filter(_SCOPE.fullmatch, challenge.scope))
                self._further_scopes[access.scope] = further
            for key in [key for key, token in self._tokens.items() if token.authorization == refused]:
                del self._tokens[key]
        header = await self._answer(access, fresh=True)
        return None if header == refused else header

    async def give_up(self, access: Access) -> None:
        """Remember that what we presented was refused with 401, so that others need not try for a while."""
        if self._challenge is not None:
            credential = await self._credentials.find(self._domain, access.repository)
            key = _key(self._challenge, credential, access)
            self._tokens.pop(key, None)
            self._refuse(key, f"{self._domain} has just refused {_who(credential)} for {self._what(key)}")

    async def _answer(self, access: Access, *, fresh: bool = False) -> str | None:
        challenge = self._challenge
        if challenge is None:
            return None
        credential = await self._credentials.find(self._domain, access.repository, fresh=fresh)
        key = _key(challenge, credential, access)
        self._check_refusal(key)
        if isinstance(credential, RegistryToken):
            return _bearer(credential.token, self._domain)
        if isinstance(challenge, BasicChallenge):
            return _basic(credential) if isinstance(credential, Password) else None
        if self._in_doubt and not fresh and self._known(key) is None:
            return None  # so that the registry says once more whom to ask
        try:
            async with self._locks.setdefault(key, trio.Lock()):
                return await self._token(key, challenge)
        except AccessDenied:
            # The token server refused what may be an old answer of a helper: passwords of clouds last an hour.
            if (
                fresh
                or await self._credentials.find(self._domain, access.repository, fresh=True) == credential
            ):
                raise
        except (Unreachable, Refused):
            if self._challenge == challenge:
                self._in_doubt = True
            raise
        return await self._answer(access)

    def _check_refusal(self, key: _Key) -> None:
        refusal = self._refusals.get(key)
        if refusal and refusal.until > trio.current_time():
            raise AccessDenied(refusal.message, remedy=_remedy(self._domain))

    async def _token(self, key: _Key, challenge: BearerChallenge) -> str:
        """The token for key, under its lock: who waited finds what the first one fetched."""
        token = self._known(key)
        if token is not None:
            return token.authorization
        self._check_refusal(key)
        try:
            token = await self._retry.run(lambda: self._fetch(key, challenge))
        except AccessDenied as error:
            self._refuse(key, error.message)
            raise
        self._tokens[key] = token
        self._forget_expired(trio.current_time())
        return token.authorization

    def _known(self, key: _Key) -> _Token | None:
        """The token that is kept, if it is good for one more request."""
        token = self._tokens.get(key)
        return token if token is not None and token.expires_at > trio.current_time() else None

    def _refuse(self, key: _Key, message: str) -> None:
        self._refusals[key] = _Refusal(message, trio.current_time() + _REFUSED_SECONDS)

    def _forget_expired(self, now: float) -> None:
        """Credentials that rotate leave keys behind; locks may go as well when nobody holds them."""
        self._tokens = {key: token for key, token in self._tokens.items() if token.expires_at > now}
        self._refusals = {key: refusal for key, refusal in self._refusals.items() if refusal.until > now}
        self._locks = {k: lock for k, lock in self._locks.items() if k in self._tokens or lock.locked()}

    async def _fetch(self, key: _Key, challenge: BearerChallenge) -> _Token:
        """One exchange with the token server (distribution's token and oauth specifications)."""
        base = self._challenged_at
        realm = follow(base, challenge.realm, registry=base, purpose="token server")
        # Our own scope first: some servers read only one, and zuul's challenge asks for what it then refuses.
        scopes = list(dict.fromkeys([key.scope, *self._further_scopes.get(key.scope, ())]))
        scopes = [scope for scope in scopes if scope]
        asked_at = trio.current_time()
        answer = await self._ask(realm, key, scopes)
        if answer.status != 200:
            await answer.settle()
            raise self._denial(answer, key)
        try:
            await answer.load(self._wire.limits.token_bytes)
        except Unreachable as error:
            raise Again(error) from error
        return self._parse(answer.body, realm, asked_at)

    async def _ask(self, realm: httpx.URL, key: _Key, scopes: list[str]) -> Answer:
        service = {"service": key.service} if key.service else {}
        if isinstance(key.credential, IdentityToken):
            form = {
                "grant_type": "refresh_token",
                "client_id": _CLIENT_ID,
                "refresh_token": key.credential.token,
            }
            scope = {"scope": " ".join(scopes)} if scopes else {}
            return await self._wire.send("POST", realm, {}, tls=self._tls, form=form | service | scope)
        url = realm.copy_merge_params({**service, "scope": scopes})
        headers = {}
        if isinstance(key.credential, Password):
            url = url.copy_merge_params({"account": key.credential.username})
            headers["Authorization"] = _basic(key.credential)
        return await self._wire.send("GET", url, headers, tls=self._tls)

    def _denial(self, answer: Answer, key: _Key) -> Exception:
        """What the answer means; its body is left out, for it may quote what was sent.

        A redirect is denied as well: following it would take the credentials elsewhere.
        """
        said = f"the token server {shown(answer.url)} answers {answer.status}"
        if answer.status in (400, 401, 403):
            message = f"no access to {self._what(key)} for {_who(key.credential)}: {said}"
            return AccessDenied(message, remedy=_remedy(self._domain))
        error = (RateLimited if answer.status == 429 else Unreachable)(
            f"no token for {self._what(key)}: {said}"
        )
        if answer.status not in RETRYABLE_STATUSES:
            return error
        return Again(error, retry_after_seconds(answer.headers.get("Retry-After")))

    def _what(self, key: _Key) -> str:
        return key.scope or self._domain

    def _parse(self, body: bytes, realm: httpx.URL, asked_at: float) -> _Token:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        fields: Mapping[str, object] = content if isinstance(content, dict) else {}
        text = fields.get("access_token") or fields.get("token")
        if not isinstance(text, str) or not text:
            raise Unreachable(f"the token server {shown(realm)} answers without a token")
        life = fields.get("expires_in")
        seconds = min(life, _LONGEST_LIFE_SECONDS) if isinstance(life, int | float) else 0.0
        seconds = max(_SHORTEST_LIFE_SECONDS, seconds)
        return _Token(_bearer(text, self._domain), asked_at + seconds - _EARLY_SECONDS)


def _key(challenge: Challenge, credential: Credential | None, access: Access) -> _Key:
    realm, service = "", None
    if isinstance(challenge, BearerChallenge):
        realm, service = challenge.realm, challenge.service
    return _Key(realm, service, credential, access.scope)


def _who(credential: Credential | None) -> str:
    return "anonymous users" if credential is None else "our credentials"


def _remedy(domain: str) -> str:
    return f"Check that it exists, and that you may read it: fsmount login {domain}"


def _basic(credential: Password) -> str:
    pair = f"{credential.username}:{credential.password}".encode()
    return f"Basic {base64.b64encode(pair).decode('ascii')}"


def _bearer(token: str, domain: str) -> str:
    if not _BEARER.fullmatch(token):
        raise AccessDenied(f"the token for {domain} holds characters that no token may have")
    return f"Bearer {token}"
