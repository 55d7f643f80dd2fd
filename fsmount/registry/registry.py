"""One registry: its address, with TLS or without, and requests with their tokens, redirects and retries."""

from collections.abc import Mapping

import httpx

from fsmount.errors import Refused, Unreachable, UsageError
from fsmount.registry.auth import Authenticator
from fsmount.registry.challenge import Challenge, parse_challenges
from fsmount.registry.credentials import DockerConfig
from fsmount.registry.failures import speaks_no_tls
from fsmount.registry.retry import RETRYABLE_STATUSES, Again, Retry, retry_after_seconds
from fsmount.registry.urls import follow, is_loopback, origin, shown
from fsmount.registry.wire import Answer, Wire

_HUB = "docker.io"
_HUB_HOST = "registry-1.docker.io"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
#: The only headers that another server gets to see (Wire adds its own two).
_HEADERS_FOR_OTHERS = frozenset({"range"})


class Registry:
    """Sends requests to one registry host; shared by all its repositories, with their tokens."""

    def __init__(
        self, domain: str, wire: Wire, credentials: DockerConfig, *, plain_http: bool, retry: Retry
    ) -> None:
        self.domain = domain
        self.retry = retry
        self._wire = wire
        self._auth = Authenticator(domain, wire, credentials, retry)
        self._bases = _bases(domain, plain_http=plain_http)

    async def send(
        self,
        method: str,
        path: str,
        *,
        repository: str,
        what: str,
        headers: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> Answer:
        """The answer to a request for a path below /v2/, or for the absolute URL of a further page.

        Authentication, redirects and retries are done with; the status is for the caller to judge, but it
        is none that another try might cure. what names the thing for messages. With a limit, the body of
        a good answer is loaded too: in one piece, or again.

        Ownership: the caller closes the answer, or takes its `error`; one that is loaded is closed.
        Raises: AccessDenied (no token), Unreachable and its kinds, Refused (a redirect), UsageError (the
            file of credentials).
        """

        async def attempt() -> Answer:
            answer = await self._once(method, path, headers or {}, repository)
            if answer.status in RETRYABLE_STATUSES:
                after_seconds = retry_after_seconds(answer.headers.get("Retry-After"))
                raise Again(await answer.error(what), after_seconds)
            if limit is not None and answer.status == 200:
                try:
                    await answer.load(limit)
                except Unreachable as error:
                    raise Again(error) from error
            return answer

        return await self.retry.run(attempt)

    async def _once(self, method: str, path: str, headers: Mapping[str, str], repository: str) -> Answer:
        authorization = await self._auth.authorization(repository)
        answer = await self._directly(method, path, _with(headers, authorization))
        if answer.status in (401, 403):
            await answer.settle()
            again = await self._reconsidered(answer, repository, authorization)
            if again is not None:
                authorization = again
                answer = await self._directly(method, path, _with(headers, authorization))
            if answer.status == 401:
                await answer.settle()
                await self._auth.give_up(repository)
        return await self._redirected(answer, method, _with(headers, authorization))

    async def _reconsidered(self, answer: Answer, repository: str, refused: str | None) -> str | None:
        """What to send in Authorization instead, after a 401 or 403."""
        challenge, url = _challenge(answer), answer.url
        if answer.status == 401 and challenge is None:
            # gcr.io may name no way in where it refuses, but does at the front door.
            ping = await self._directly("GET", "", {})
            await ping.settle()
            challenge, url = _challenge(ping), ping.url
        return await self._auth.after_refusal(answer.status, challenge, url, repository, refused)

    async def _directly(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        """The registry's own answer; of the possible schemes, the one that worked is kept."""
        for base in self._bases[:-1]:
            try:
                answer = await self._wire.send(method, _below(base, path), headers)
            except Again as again:
                if not speaks_no_tls(again.error):
                    raise
            else:
                self._bases = [base]
                return answer
        answer = await self._wire.send(method, _below(self._bases[-1], path), headers)
        self._bases = self._bases[-1:]
        return answer

    async def _redirected(self, answer: Answer, method: str, headers: Mapping[str, str]) -> Answer:
        """The answer at the end of all redirects. When they leave the registry, credentials stay behind."""
        registry = answer.url
        for _ in range(_MOST_REDIRECTS):
            location = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or not location:
                return answer
            await answer.settle()
            url = follow(answer.url, location, registry=registry, purpose="redirect")
            if origin(url) != origin(registry):
                headers = {name: headers[name] for name in headers if name.lower() in _HEADERS_FOR_OTHERS}
            answer = await self._wire.send(method, url, headers)
        if answer.status in _REDIRECTS:
            await answer.settle()
            raise Unreachable(f"{shown(registry)} redirects more than {_MOST_REDIRECTS} times")
        return answer


def _below(base: httpx.URL, path: str) -> httpx.URL:
    """Guards what credentials are sent to: a further page may be named by the registry itself."""
    url = base.join(path)
    if origin(url) != origin(base):
        raise Refused(f"{shown(base)} leads to another server: {shown(url)}")
    return url


def _with(headers: Mapping[str, str], authorization: str | None) -> Mapping[str, str]:
    return {**headers, "Authorization": authorization} if authorization else headers


def _challenge(answer: Answer) -> Challenge | None:
    return parse_challenges(answer.headers.get_list("WWW-Authenticate"))


def _bases(domain: str, *, plain_http: bool) -> list[httpx.URL]:
    """Where to ask, in the order to try: only for this machine itself may http follow https."""
    host = _HUB_HOST if domain == _HUB else domain
    try:
        https = httpx.URL(f"https://{host}/v2/")
    except httpx.InvalidURL as error:
        raise UsageError(f"{domain[:300]!r} is no registry host: {error}") from None
    http = https.copy_with(scheme="http")
    if plain_http:
        return [http]
    return [https, http] if is_loopback(https.host) else [https]
