"""Server: one endpoint's address, with TLS or without, and requests with their tokens, redirects and retries."""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import httpx
import trio

from fsmount.errors import DeadlineExpired, FsmountError, Refused, Unreachable
from fsmount.registry.auth import Access, Authenticator
from fsmount.registry.challenge import Challenge, parse_challenges
from fsmount.registry.credentials import Credentials
from fsmount.registry.endpoint import Endpoint, Tls
from fsmount.registry.failures import speaks_no_tls
from fsmount.registry.retry import RETRYABLE_STATUSES, Again, Retry, retry_after_seconds
from fsmount.registry.signed import REFUSALS, SignedUrls
from fsmount.registry.urls import follow, origin, shown
from fsmount.registry.wire import Answer, Wire

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5
#: The only headers that another server gets to see (Wire adds its own two).
_HEADERS_FOR_OTHERS = frozenset({"range"})
#: How long a mirror that failed is left alone at first; twice as long after each further failure.
_REST_SECONDS = 15.0
_LONGEST_REST_SECONDS = 300.0
_RATE = re.compile(r"\s*([0-9]{1,9})(?:\s*;\s*w=([0-9]{1,9}))?")


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What Docker Hub says of the pulls that are left: so many of `limit` in a window, counted for `source`."""

    limit: int | None
    remaining: int
    window_seconds: int | None
    source: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """How many requests were sent, and how many of them were a further try. Tokens and redirects do not count."""

    requests: int
    retries: int


class Server:
    """Sends requests to one server; shared by all repositories on it, with their tokens."""

    def __init__(self, endpoint: Endpoint, wire: Wire, credentials: Credentials, *, retry: Retry) -> None:
        """What endpoint says of a repository does not matter here."""
        self.domain = endpoint.domain
        self.retry = retry
        self.limits = wire.limits
        self.rate_limit: RateLimit | None = None
        self.asked = Asked(0, 0)
        self.health = Health()
        self._wire = wire
        self._tls = endpoint.tls
        self._headers = _joined(endpoint.headers)
        self._connect_seconds = endpoint.connect_seconds
        self._auth = Authenticator(endpoint.domain, wire, credentials, retry, tls=endpoint.tls)
        self._bases = [httpx.URL(base) for base in endpoint.bases]
        self._signed = SignedUrls()
        self._places = trio.CapacityLimiter(wire.limits.requests)

    async def send(
        self,
        method: str,
        path: str,
        *,
        access: Access,
        what: str,
        headers: Mapping[str, str] | None = None,
        limit: int | None = None,
        content: bytes | None = None,
        signed: bool = False,
        stay: bool = False,
        again: bool = True,
    ) -> Answer:
        """The answer to a request for a path below the server's base, or for the absolute URL of a further page.

        Authentication, redirects and retries are done with; the status is for the caller to judge, but it
        is none that another try might cure. what names the thing for messages. With a limit, the body of
        a good answer is loaded too: in one piece, or again. signed: where the path redirects to is asked
        directly from then on, as long as that address is good. stay: a redirect is the answer. again:
        whether what another try might cure is tried again.

        Ownership: the caller closes the answer, or takes its `error`; one that is loaded is closed.
        Raises: AccessDenied (no token), Unreachable and its kinds, Refused (a redirect), UsageError (the
            file of credentials, or of a certificate).
        """

        is_again = False

        async def attempt() -> Answer:
            nonlocal is_again
            self.asked = Asked(self.asked.requests + 1, self.asked.retries + is_again)
            is_again = True
            answer = await self._held(
                lambda: self._anywhere(method, path, headers or {}, access, content, signed, stay)
            )
            self._note_rate(answer)
            if answer.status in RETRYABLE_STATUSES:
                after_seconds = retry_after_seconds(answer.headers.get("Retry-After"))
                raise Again(await answer.error(what), after_seconds)
            if limit is not None and answer.status == 200:
                try:
                    await answer.load(limit)
                except Unreachable as error:
                    raise Again(error) from error
            return answer

        try:
            answer = await (self.retry if again else replace(self.retry, tries=1)).run(attempt)
        except FsmountError as error:
            if error.transient:
                self.health.note_failure()
            raise
        self.health.note_success()
        answer.when_broken(self.health.note_failure)
        return answer

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Bounds what is asked of the server within. Raises: DeadlineExpired, which counts as its failure."""
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError:
            self.health.note_failure()
            raise DeadlineExpired(f"{self.domain} has not answered within {seconds:g} s") from None

    async def knock(self) -> Answer:
        """What the server says at its front door to somebody whom it does not know.

        Ownership: the caller's. Raises: Unreachable and its kinds, UsageError (the file of a certificate).
        """
        try:
            return await self._directly("GET", "", {}, None)
        except Again as again:
            raise again.error from again.error.__cause__

    async def probe(self) -> None:
        """Finds out whether the server answers again, whatever it answers but errors of its own."""
        try:
            answer = await self.knock()
        except FsmountError:
            self.health.note_failure()
            return
        await answer.settle()
        if answer.status in RETRYABLE_STATUSES:
            self.health.note_failure()
        else:
            self.health.note_success()

    async def _held(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """An answer that counts among the requests under way until it is closed."""
        place = object()
        await self._places.acquire_on_behalf_of(place)
        try:
            answer = await ask()
        except BaseException:
            self._places.release_on_behalf_of(place)
            raise
        answer.when_closed(lambda: self._places.release_on_behalf_of(place))
        return answer

    async def _anywhere(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        access: Access,
        content: bytes | None,
        signed: bool,
        stay: bool,
    ) -> Answer:
        """The server's answer, or that of the place to which it redirects."""
        elsewhere = self._signed.find(path, trio.current_time()) if signed else None
        if elsewhere is not None:
            with suppress(Again, Unreachable):
                answer = await self._wire.send(method, elsewhere, _for_others(headers), tls=self._others_tls)
                if answer.status not in REFUSALS:
                    return answer
                await answer.settle()
            self._signed.drop(path)
        answer, sent = await self._authorized(method, path, headers, access, content)
        return answer if stay else await self._redirected(answer, method, path, sent, signed)

    async def _authorized(
        self, method: str, path: str, headers: Mapping[str, str], access: Access, content: bytes | None
    ) -> tuple[Answer, Mapping[str, str]]:
        """The server's own answer, and the headers that it was sent."""
        authorization = await self._auth.authorization(access)
        answer = await self._directly(method, path, _with(headers, authorization), content)
        if answer.status in (401, 403):
            await answer.settle()
            again = await self._reconsidered(answer, access, authorization)
            if again is not None:
                authorization = again
                answer = await self._directly(method, path, _with(headers, authorization), content)
            if answer.status == 401:
                await answer.settle()
                await self._auth.give_up(access)
        return answer, _with(headers, authorization)

    async def _reconsidered(self, answer: Answer, access: Access, refused: str | None) -> str | None:
        """What to send in Authorization instead, after a 401 or 403."""
        challenge, url = _challenge(answer), answer.url
        if answer.status == 401 and challenge is None:
            # gcr.io may name no way in where it refuses, but does at the front door.
            ping = await self._directly("GET", "", {}, None)
            await ping.settle()
            challenge, url = _challenge(ping), ping.url
        return await self._auth.after_refusal(answer.status, challenge, url, access, refused)

    async def _directly(
        self, method: str, path: str, headers: Mapping[str, str], content: bytes | None
    ) -> Answer:
        """The server's own answer; of the possible schemes, the one that worked is kept."""
        for base in self._bases[:-1]:
            try:
                answer = await self._ask(method, _below(base, path), headers, content)
            except Again as again:
                if not speaks_no_tls(again.error):
                    raise
            else:
                self._bases = [base]
                return answer
        answer = await self._ask(method, _below(self._bases[-1], path), headers, content)
        self._bases = self._bases[-1:]
        return answer

    async def _ask(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], content: bytes | None
    ) -> Answer:
        # What an administrator wrote for this host may be a login of its own.
        return await self._wire.send(
            method,
            url,
            {**headers, **self._headers},
            tls=self._tls,
            connect_seconds=self._connect_seconds,
            content=content,
        )

    @property
    def _others_tls(self) -> Tls:
        """For where a redirect leads: the same authorities, but nobody else is told who we are."""
        return replace(self._tls, client=None)

    async def _redirected(
        self, answer: Answer, method: str, path: str, headers: Mapping[str, str], signed: bool
    ) -> Answer:
        """The answer at the end of all redirects. When they leave the server, credentials stay behind."""
        registry = answer.url
        for _ in range(_MOST_REDIRECTS):
            location = answer.headers.get("Location")
            # An upload's Location is an address for the next step.
            if answer.status not in _REDIRECTS or not location:
                return answer
            await answer.settle()
            url = follow(answer.url, location, registry=registry, purpose="redirect")
            if origin(url) == origin(registry):
                answer = await self._ask(method, url, headers, None)
                continue
            headers = _for_others(headers)
            answer = await self._wire.send(method, url, headers, tls=self._others_tls)
            if signed and answer.status in (200, 206):
                self._signed.keep(path, url, trio.current_time())
        if answer.status in _REDIRECTS:
            await answer.settle()
            raise Unreachable(f"{shown(registry)} redirects more than {_MOST_REDIRECTS} times")
        return answer

    def _note_rate(self, answer: Answer) -> None:
        remaining = _RATE.match(answer.headers.get("RateLimit-Remaining", ""))
        if remaining is None:
            return
        limit = _RATE.match(answer.headers.get("RateLimit-Limit", ""))
        window = remaining[2] or (limit[2] if limit else None)
        source = answer.headers.get("Docker-RateLimit-Source")
        self.rate_limit = RateLimit(
            limit=int(limit[1]) if limit else None,
            remaining=int(remaining[1]),
            window_seconds=int(window) if window else None,
            source=source,
        )


class Health:
    """Whether a server has answered lately, and when it may be asked again if it has not."""

    def __init__(self) -> None:
        self._failures = 0
        self._rests_until = float("-inf")
        self._is_probed = False

    @property
    def is_good(self) -> bool:
        """Whether the last request was answered."""
        return self._failures == 0

    def take_probe(self) -> bool:
        """Whether it has rested long enough to be asked again; true once, until that has come to something."""
        if self.is_good or self._is_probed or trio.current_time() < self._rests_until:
            return False
        self._is_probed = True
        return True

    def note_failure(self) -> None:
        """It did not answer, or only with errors of its own, or its body broke off."""
        if trio.current_time() < self._rests_until:
            return  # a hundred requests that fail together are one failure
        rest = min(_REST_SECONDS * 2.0**self._failures, _LONGEST_REST_SECONDS)
        self._failures = min(self._failures + 1, 30)
        self._rests_until = trio.current_time() + rest
        self._is_probed = False

    def note_success(self) -> None:
        """It answered."""
        self._failures = 0
        self._is_probed = False


def _joined(headers: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """As a mapping; several of one name are one list (RFC 9110, section 5.2)."""
    joined: dict[str, str] = {}
    for name, value in headers:
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


def _for_others(headers: Mapping[str, str]) -> Mapping[str, str]:
    return {name: headers[name] for name in headers if name.lower() in _HEADERS_FOR_OTHERS}


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
