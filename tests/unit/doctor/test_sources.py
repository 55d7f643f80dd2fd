"""What is said of registries: over a network that is scripted, and of answers that are made up."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from fsmount.config import Config
from fsmount.configfile import load_config
from fsmount.doctor import examination, sources
from fsmount.doctor.finding import Finding, Verdict
from fsmount.errors import Unreachable
from fsmount.registry.credentials import Credentials
from fsmount.registry.endpoint import Endpoint
from fsmount.registry.greeting import Greeting, Way, addresses, way_to
from fsmount.registry.hosts import Hosts
from fsmount.registry.open import Sources
from tests.fakes.registry import FakeRegistry, Network, Reply, error

HOST = "registry.example"
OK, WARNING, PROBLEM = Verdict


def config_of(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load_config(file, cache=tmp_path / "cache", environ={})


@pytest.fixture
def fake() -> FakeRegistry:
    fake = FakeRegistry(host=HOST)
    fake.then("GET", "tags/list", *[Reply(body=b'{"tags": ["main", "v1", "v2"]}')] * 9)
    return fake


async def examine(
    fake: FakeRegistry, config: Config, tmp_path: Path, environ: Mapping[str, str] | None = None
) -> list[Finding]:
    """What is found of the sources of a configuration, where that registry is the whole network."""
    async with Sources(
        hosts=Hosts(root=tmp_path, environ={}, home=tmp_path / "home"),
        credentials=Credentials(config.registries, environ=environ or {}, home=tmp_path / "home"),
        transport=Network({HOST: fake}).transport,
    ) as opened:
        return await examination._run(await sources.checks(config, opened))


def by_check(found: list[Finding], check: str) -> list[Finding]:
    return [one for one in found if one.check == check]


# -------------------- apps


async def test_each_app_is_asked_for_its_tags_and_those_that_it_shows(
    tmp_path: Path, fake: FakeRegistry
) -> None:
    text = f'[apps.web]\nrepository = "{HOST}/team/web"\n'
    text += f'[apps.some]\nrepository = "{HOST}/team/web"\ntags = ["v*"]\n'
    text += f'[apps.none]\nrepository = "{HOST}/team/web"\ntags = ["x*"]\n'
    found = by_check(await examine(fake, config_of(tmp_path, text), tmp_path), "app")
    assert [(one.subject, one.verdict) for one in found] == [("web", OK), ("some", OK), ("none", WARNING)]
    assert [one.message.partition(" shows ")[2] for one in found] == ["3 tags", "2 of 3 tags", "none"]
    assert "['x*']" in (found[2].remedy or "")


async def test_an_app_that_does_not_exist_or_is_refused_is_a_problem(
    tmp_path: Path, fake: FakeRegistry
) -> None:
    config = config_of(tmp_path, f'[apps.web]\nrepository = "{HOST}/team/web"\n')
    for status, words in ((404, "does not exist"), (403, "no access")):
        fake = FakeRegistry(host=HOST)
        fake.then("GET", "tags/list", *[error(status, "X")] * 9)
        (found,) = by_check(await examine(fake, config, tmp_path), "app")
        assert found.verdict is PROBLEM and words in found.message


async def test_a_layout_folder_is_an_app_without_a_registry(tmp_path: Path, fake: FakeRegistry) -> None:
    config = config_of(tmp_path, '[apps.web]\nrepository = "oci-layout:/nowhere"\n')
    (found,) = await examine(fake, config, tmp_path)
    assert (found.check, found.subject, found.verdict) == ("app", "web", PROBLEM)
    assert "/nowhere" in found.message


# -------------------- servers


ORIGIN = Endpoint((f"https://{HOST}/v2/",), "team/web", HOST, is_origin=True)


def greeting(**changes: object) -> Greeting:
    good = Greeting(f"https://{HOST}/v2/", 401, 0.2, datetime.now(UTC) + timedelta(days=80))
    return replace(good, **changes)  # type: ignore[arg-type]


def test_a_server_that_answers_has_three_good_signs() -> None:
    found = list(sources.judge(greeting(), ORIGIN, "http://proxy:3128"))
    assert [(one.check, one.verdict) for one in found] == [
        ("registry", OK),
        ("certificate", OK),
        ("clock", OK),
    ]
    assert "through the proxy http://proxy:3128" in found[0].message


@pytest.mark.parametrize("status", [200, 401, 403])
def test_at_its_front_door_a_registry_may_ask_who_we_are(status: int) -> None:
    assert next(sources.judge(greeting(status=status), ORIGIN, None)).verdict is OK


@pytest.mark.parametrize("status", [404, 500, 503, 302])
def test_any_other_answer_is_none_of_a_registry_and_of_a_mirror_it_is_a_warning(status: int) -> None:
    assert next(sources.judge(greeting(status=status), ORIGIN, None)).verdict is PROBLEM
    mirror = replace(ORIGIN, is_origin=False)
    assert next(sources.judge(greeting(status=status), mirror, None)).verdict is WARNING


@pytest.mark.parametrize(
    "ahead, verdict, words",
    [(59, OK, "agree"), (-59, OK, "agree"), (61, WARNING, "behind"), (-3600, WARNING, "ahead of")],
)
def test_clocks_more_than_a_minute_apart_are_a_warning(ahead: float, verdict: Verdict, words: str) -> None:
    *_, clock = sources.judge(greeting(ahead_seconds=ahead), ORIGIN, None)
    assert (clock.check, clock.verdict) == ("clock", verdict) and words in clock.message


def test_a_server_that_does_not_say_what_time_it_is_is_not_judged_by_it() -> None:
    assert "clock" not in {one.check for one in sources.judge(greeting(ahead_seconds=None), ORIGIN, None)}


@pytest.mark.parametrize(
    "said, remedy",
    [
        ("certificate has expired", "If this machine's clock is right"),
        ("certificate is not yet valid", "If this machine's clock is right"),
        ("Hostname mismatch, certificate is not valid for 'x'.", "Use a name that the certificate has"),
        ("unable to get local issuer certificate", "Add it."),
    ],
)
def test_what_is_to_be_done_about_a_certificate_depends_on_what_is_wrong_with_it(
    said: str, remedy: str
) -> None:
    error = Unreachable(f"it cannot be reached: its certificate is not trusted: {said}", remedy="Add it.")
    assert (sources._remedy(error) or "").startswith(remedy)


@pytest.mark.parametrize("days, verdict", [(80, OK), (15, OK), (13, WARNING), (0, WARNING)])
def test_a_certificate_that_expires_within_a_fortnight_is_a_warning(days: int, verdict: Verdict) -> None:
    expires = datetime.now(UTC) + timedelta(days=days, hours=1)
    _, certificate, _ = sources.judge(greeting(certificate_expires=expires), ORIGIN, None)
    assert (certificate.check, certificate.verdict) == ("certificate", verdict)


def test_where_any_certificate_is_accepted_that_is_told_and_without_tls_there_is_none() -> None:
    _, certificate, _ = sources.judge(greeting(certificate_expires=None), ORIGIN, None)
    assert certificate.verdict is WARNING and "any certificate" in certificate.message
    plain = greeting(certificate_expires=None, url=f"http://{HOST}/v2/")
    assert "certificate" not in {one.check for one in sources.judge(plain, ORIGIN, None)}


async def test_the_clock_of_a_server_is_in_its_answer(tmp_path: Path, fake: FakeRegistry) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    fake.then("GET", "/v2/", Reply(headers={"Date": date}))
    config = config_of(tmp_path, f'[apps.web]\nrepository = "{HOST}/team/web"\n')
    (clock,) = by_check(await examine(fake, config, tmp_path), "clock")
    assert clock.verdict is WARNING and "behind" in clock.message


# -------------------- names


@pytest.mark.parametrize(
    "environ, way",
    [
        ({}, Way(HOST, 443, None)),
        (
            {"HTTPS_PROXY": "http://me:secret@proxy.example:3128"},
            Way("proxy.example", 3128, "http://proxy.example:3128"),
        ),
        ({"HTTPS_PROXY": "proxy.example", "NO_PROXY": ".example"}, Way(HOST, 443, None)),
    ],
)
def test_the_name_to_look_up_is_the_server_s_or_that_of_its_proxy(
    environ: Mapping[str, str], way: Way
) -> None:
    assert way_to(ORIGIN, environ) == way


async def test_a_name_that_has_no_address_is_a_problem() -> None:
    assert await addresses(Way("localhost", 80, None))
    with pytest.raises(Unreachable, match=r"nothing\.invalid has no address"):
        await addresses(Way("nothing.invalid", 80, None))
    assert Way("127.0.0.1", 80, None).is_address and Way("[::1]", 80, None).is_address
    assert not Way(HOST, 80, None).is_address


# -------------------- credentials


async def test_without_credentials_a_registry_is_asked_anonymously(
    tmp_path: Path, fake: FakeRegistry
) -> None:
    config = config_of(tmp_path, f'[apps.web]\nrepository = "{HOST}/team/web"\n')
    (found,) = by_check(await examine(fake, config, tmp_path), "credentials")
    assert found.verdict is OK and "anonymously" in found.message
