"""sources: whether registries can be asked: name, way, certificate, clock, credentials, and the apps' repositories."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from fsmount.config import App, Config
from fsmount.doctor.finding import Check, Finding
from fsmount.errors import AccessDenied, FsmountError
from fsmount.oci.reference import Reference
from fsmount.registry.credentials import Credentials, Result
from fsmount.registry.endpoint import Endpoint
from fsmount.registry.greeting import Greeting, Way, addresses, greet, introduce, way_to
from fsmount.registry.open import Sources
from fsmount.registry.remote import Remote

#: How far two clocks may be apart.
_APART_SECONDS = 60.0
_EXPIRES_SOON_DAYS = 14
#: Where nobody answers, and nobody says why.
_SILENT = (
    "Does it run, at this address and port? Do firewalls and proxies on the way let this machine through?"
)
#: What registries answer at their front door: come in, or who are you.
_GREETINGS = frozenset({200, 401, 403})


async def checks(config: Config, sources: Sources) -> list[Check]:
    """One for each name, server, registry with credentials, and app."""
    remotes: dict[str, Remote] = {}
    blocked: list[Finding] = []
    registries: dict[str, Reference] = {}
    for name, app in config.apps.items():
        if not isinstance(app.repository, Reference):
            continue
        registries.setdefault(app.repository.domain, app.repository)
        try:
            for remote in await sources.remotes(app.repository):
                # One server may stand at several places.
                remotes.setdefault(remote.endpoint.bases[0], remote)
        except FsmountError as error:
            blocked.append(Finding.problem("app", error.message, remedy=error.remedy, subject=name))
    credentials = Credentials(config.registries)
    ways = {way.host: way for remote in remotes.values() if not (way := way_to(remote.endpoint)).is_address}
    return [
        *(Check("app", finding.subject, partial(_already, finding)) for finding in blocked),
        *(Check("name", host, partial(_name, way)) for host, way in ways.items()),
        *(
            Check("registry", remote.server.domain, partial(_server, sources, remote))
            for remote in remotes.values()
        ),
        *(
            Check("credentials", domain, partial(_credentials, sources, credentials, reference))
            for domain, reference in registries.items()
        ),
        *(Check("app", name, partial(_app, sources, name, app)) for name, app in config.apps.items()),
    ]


async def _already(finding: Finding) -> Sequence[Finding]:
    return [finding]


async def _name(way: Way) -> Sequence[Finding]:
    found = await addresses(way)
    purpose = f", the proxy {way.proxy}" if way.proxy else ""
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return [Finding.ok("name", f"{way.host}{purpose}: {shown}", subject=way.host)]


async def _server(sources: Sources, remote: Remote) -> Sequence[Finding]:
    domain, proxy = remote.server.domain, way_to(remote.endpoint).proxy
    try:
        greeting = await greet(remote.server)
    except FsmountError as error:
        message = error.message if proxy is None else f"{error.message} (through the proxy {proxy})"
        # Where a mirror fails, the next server is asked.
        make = Finding.problem if remote.endpoint.is_origin else Finding.warning
        return [make("registry", message, remedy=_remedy(error), subject=domain)]
    return list(judge(greeting, remote.endpoint, proxy))


def judge(greeting: Greeting, endpoint: Endpoint, proxy: str | None) -> Iterator[Finding]:
    """What an answer tells of a server, its certificate and the two clocks."""
    domain = endpoint.domain
    through = f" through the proxy {proxy}" if proxy else ""
    if greeting.status in _GREETINGS:
        yield Finding.ok("registry", f"{greeting.url} answers{through}", subject=domain)
    else:
        make = Finding.problem if endpoint.is_origin else Finding.warning
        yield make(
            "registry",
            f"{greeting.url} answers {greeting.status}{through}, and a registry 200 or 401",
            remedy="Is it the address of a registry? If so, its own log says what is wrong.",
            subject=domain,
        )
    if greeting.url.startswith("https:"):
        yield _certificate(greeting, endpoint)
    ahead = greeting.ahead_seconds
    if ahead is not None and abs(ahead) > _APART_SECONDS:
        yield Finding.warning(
            "clock",
            f"this machine's clock is {abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} that of {domain}",
            remedy="Have it set by NTP (timedatectl set-ntp true): certificates and tokens have their times.",
            subject=domain,
        )
    elif ahead is not None:
        yield Finding.ok("clock", f"this machine and {domain} agree on the time", subject=domain)


def _certificate(greeting: Greeting, endpoint: Endpoint) -> Finding:
    domain, expires = endpoint.domain, greeting.certificate_expires
    if expires is None:
        return Finding.warning(
            "certificate",
            f"any certificate is accepted from {domain}, because {endpoint.written_in} says so",
            remedy="Have the authority's certificate trusted instead.",
            subject=domain,
        )
    days = (expires - datetime.now(UTC)).days
    text = f"the certificate of {domain} is trusted, and good until {expires:%Y-%m-%d}"
    if days < _EXPIRES_SOON_DAYS:
        return Finding.warning(
            "certificate", text, remedy=f"It expires in {days} days: have it renewed.", subject=domain
        )
    return Finding.ok("certificate", text, subject=domain)


def _remedy(error: FsmountError) -> str | None:
    if "certificate has expired" in error.message or "not yet valid" in error.message:
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        return f"If this machine's clock is right ({now}), have the certificate renewed."
    if "mismatch" in error.message:
        return (
            "Use a name that the certificate has; or a proxy or captive portal answers in the server's place."
        )
    return error.remedy or _SILENT


async def _credentials(sources: Sources, credentials: Credentials, reference: Reference) -> Sequence[Finding]:
    """Which there are for a registry, and whether it takes them; not what they are."""
    domain = reference.domain
    explanation = await credentials.explain(domain, reference.repository)
    match = explanation.match
    if match is None or match.credential is None:
        why = "there are none" if match is None else "the configuration wants it so"
        return [Finding.ok("credentials", f"{domain} is asked anonymously: {why}", subject=domain)]
    (used,) = (step for step in explanation.steps if step.result is Result.USED)
    place = used.where or used.source
    if match.helper is not None:
        place = f"{match.helper}, which {place} names"
    origin = next(remote for remote in await sources.remotes(reference) if remote.endpoint.is_origin)
    try:
        await introduce(origin.server)
    except AccessDenied:
        return [
            Finding.problem(
                "credentials",
                f"{domain} does not take the credentials from {place}",
                remedy=f"fsmount login {domain}",
                subject=domain,
            )
        ]
    except FsmountError as error:
        return [
            Finding.warning(
                "credentials",
                f"credentials for {domain} are in {place}; whether they are taken is not known: {error.message}",
                subject=domain,
            )
        ]
    return [Finding.ok("credentials", f"{domain} takes the credentials from {place}", subject=domain)]


async def _app(sources: Sources, name: str, app: App) -> Sequence[Finding]:
    try:
        tags = await sources.open(app.repository).tags()
    except FsmountError as error:
        remedy = error.remedy or (
            "See what is found of its registry."
            if error.transient
            else f"Is the repository of [apps.{name}] right, and has an image been pushed there?"
        )
        return [Finding.problem("app", error.message, remedy=remedy, subject=name)]
    shown = [tag for tag in tags if app.shows(tag)]
    what = str(app.repository)
    if not shown:
        remedy = f"Its tags = {list(app.tags)} match none of them." if tags else "Push an image there."
        return [
            Finding.warning(
                "app", f"{what} has {len(tags)} tags, and shows none", remedy=remedy, subject=name
            )
        ]
    of = f" of {len(tags)}" if len(shown) < len(tags) else ""
    return [Finding.ok("app", f"{what} shows {len(shown)}{of} tags", subject=name)]
