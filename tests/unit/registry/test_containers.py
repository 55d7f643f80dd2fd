"""Registries.conf, version 2; skopeo is asked about the same in tests/integration."""

import logging
import os
import tomllib
from pathlib import Path

import pytest

from fsmount.errors import AccessDenied, Invalid, UsageError
from fsmount.oci.shape import Shape
from fsmount.registry import containers
from fsmount.registry.containers import Place, Rule
from fsmount.registry.endpoint import Capability

PATH = Path("/containers/registries.conf")
ORIGIN = Capability.ALL
MIRROR = Capability.PULL | Capability.RESOLVE


def parse(text: str) -> dict[str, Rule]:
    return containers.parse(Shape(tomllib.loads(text), str(PATH)), PATH)


def places(text: str, name: str) -> tuple[Place, ...]:
    domain, _, repository = name.partition("/")
    return containers.places(parse(text), domain, repository)


def asked(text: str, name: str) -> list[str]:
    return [f"{place.host}/{place.repository}" for place in places(text, name)]


def prefixes(*prefixes: str) -> str:
    """Rules that each lead to a server called after their number."""
    return "\n".join(
        f'[[registry]]\nprefix = "{prefix}"\nlocation = "{number}.example"'
        for number, prefix in enumerate(prefixes)
    )


@pytest.mark.parametrize(
    ("prefix", "name", "place"),
    [
        ("r.example", "r.example/a/b", "0.example/a/b"),
        ("r.example/a", "r.example/a/b", "0.example/b"),
        ("r.example/a/", "r.example/a/b", "0.example/b"),
        ("r.example/a", "r.example/ab", None),
        ("r.example", "r.example:5000/a", "0.example:5000/a"),
        ("r.example:5000", "r.example:5000/a", "0.example/a"),
        ("r.example:500", "r.example:5000/a", None),
        ("r.example:5000", "r.example/a", None),
        ("r.example", "sub.r.example/a", None),
        ("*.example", "r.example/a", "0.example/a"),
        ("*.r.example", "a.b.r.example/a", "0.example/a"),
        ("*.r.example", "a.r.example:5000/a", "0.example:5000/a"),
        ("*.r.example", "r.example/a", None),
        ("*.r.example", "ar.example/a", None),
        ("*.r.example", "evil.example/a.r.example/a", None),
        ("docker.io", "docker.io/library/web", "0.example/library/web"),
        ("docker.io/library", "docker.io/library/web", "0.example/web"),
        ("docker.io/web", "docker.io/library/web", None),
    ],
)
def test_a_prefix_ends_where_a_part_of_the_name_ends(prefix: str, name: str, place: str | None) -> None:
    assert asked(prefixes(prefix), name) == ([place] if place else [])


@pytest.mark.parametrize(
    ("rules", "place"),
    [
        (("r.example", "r.example/a", "r.example/a/b/c"), "1.example/b"),
        (("*.example", "r.example/a"), "1.example/b"),
        (("r.example", "r.example"), "0.example/a/b"),
        (("r.example/x", "*.r.example"), None),
    ],
)
def test_the_longest_prefix_decides(rules: tuple[str, ...], place: str | None) -> None:
    assert asked(prefixes(*rules), "r.example/a/b") == ([place] if place else [])


def test_of_two_prefixes_of_one_length_the_wildcard_decides() -> None:
    assert asked(prefixes("a.r.example", "*.r.example"), "a.r.example/x") == ["1.example/x"]


def test_mirrors_come_in_the_order_of_the_file_and_the_location_is_the_origin() -> None:
    text = """
        [[registry]]
        prefix = "r.example/team"
        location = "internal.example/x"
        [[registry.mirror]]
        location = "z.example:5000/proj"
        insecure = true
        [[registry.mirror]]
        location = "a.example"
    """
    assert places(text, "r.example/team/web") == (
        Place("z.example:5000", "proj/web", True, MIRROR, False, PATH),
        Place("a.example", "web", False, MIRROR, False, PATH),
        Place("internal.example", "x/web", False, ORIGIN, True, PATH),
    )


def test_the_prefix_is_the_location_where_it_is_not_given() -> None:
    assert places('[[registry]]\nlocation = "r.example/a"\ninsecure = true', "r.example/a/b") == (
        Place("r.example", "a/b", True, ORIGIN, True, PATH),
    )


def test_a_wildcard_without_a_location_leaves_the_name_as_it_is() -> None:
    text = '[[registry]]\nprefix = "*.example"\n[[registry.mirror]]\nlocation = "m.test/x"'
    assert asked(text, "r.example/a") == ["m.test/x/a", "r.example/a"]


@pytest.mark.parametrize(
    ("use", "capabilities"),
    [
        ("", MIRROR),
        ('pull-from-mirror = ""', MIRROR),
        ('pull-from-mirror = "all"', MIRROR),
        ('pull-from-mirror = "tag-only"', MIRROR),
        ('pull-from-mirror = "digest-only"', Capability.PULL),
    ],
)
def test_a_mirror_may_be_for_tags_or_digests(use: str, capabilities: Capability) -> None:
    text = f'[[registry]]\nlocation = "r.example"\n[[registry.mirror]]\nlocation = "m.example"\n{use}'
    mirror, origin = places(text, "r.example/a")
    assert (mirror.capabilities, origin.capabilities) == (capabilities, ORIGIN)


def test_mirror_by_digest_only_holds_for_all_mirrors_of_a_registry() -> None:
    text = """
        [[registry]]
        location = "r.example"
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "m.example"
        [[registry.mirror]]
        location = "n.example"
    """
    *mirrors, origin = places(text, "r.example/a")
    assert [mirror.capabilities for mirror in mirrors] == [Capability.PULL, Capability.PULL]
    assert origin.capabilities == ORIGIN


BLOCKED = """
    [[registry]]
    location = "blocked.example"
    blocked = true
    [[registry]]
    prefix = "moved.example"
    location = "blocked.example/x"
    [[registry]]
    location = "r.example"
    [[registry.mirror]]
    location = "blocked.example"
    [[registry.mirror]]
    location = "m.example"
    [[registry]]
    prefix = "hidden.example"
    location = "r.example"
    blocked = true
"""


@pytest.mark.parametrize("name", ["blocked.example/a", "moved.example/a", "hidden.example/a"])
def test_a_blocked_name_is_denied_and_the_file_is_named(name: str) -> None:
    with pytest.raises(AccessDenied, match=str(PATH)) as caught:
        places(BLOCKED, name)
    assert caught.value.remedy


def test_a_mirror_that_is_blocked_itself_is_left_out() -> None:
    assert asked(BLOCKED, "r.example/a") == ["m.example/a", "r.example/a"]


@pytest.mark.parametrize(
    ("prefix", "location", "name"),
    [
        ("r.example", "mirror", "r.example/a"),  # docker.io/mirror/a
        ("r.example", "docker.io", "r.example/a"),  # docker.io/library/a
        ("r.example/a", "m.example:5000", "r.example/a"),  # a tag of docker.io/library/m.example
        ("r.example", "m.example/UP", "r.example/a"),
    ],
)
def test_a_location_that_makes_no_full_name_is_an_error(prefix: str, location: str, name: str) -> None:
    text = f'[[registry]]\nprefix = "{prefix}"\nlocation = "{location}"'
    with pytest.raises(UsageError, match=str(PATH)) as caught:
        places(text, name)
    assert location in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[registries.search]\nregistries = ["r.example"]', "version 1"),
        ("registry = 1", "registry is not a list"),
        ("registry = [1]", r"registry\[0\] is not an object"),
        ("[[registry]]", r"registry\[0\] has neither"),
        ('[[registry]]\nprefix = "r.example"', r"registry\[0\] has no location"),
        ('[[registry]]\nprefix = "r.example"\nblocked = true', r"registry\[0\] has no location"),
        ('[[registry]]\nprefix = "*.example/a"', r"registry\[0\]: only a host"),
        ('[[registry]]\nprefix = "*.example:5000"', r"registry\[0\]: only a host"),
        ('[[registry]]\nlocation = "https://r.example"', r"registry\[0\]: location has a scheme"),
        ('[[registry]]\nprefix = "http://r.example"\nlocation = "x.example"', "prefix has a scheme"),
        ("[[registry]]\nlocation = 1", r"registry\[0\].location is not a string"),
        ('[[registry]]\nlocation = "r.example"\ninsecure = "yes"', "insecure is not a boolean"),
        ('[[registry]]\nlocation = "r.example"\nblocked = 1', "blocked is not a boolean"),
        ('[[registry]]\nlocation = "r.example"\npull-from-mirror = "all"', "belongs to a mirror"),
        ('[[registry]]\nlocation = "r.example"\nmirror = "m.example"', "mirror is not a list"),
        ('[[registry]]\nlocation = "r.example"\n[[registry.mirror]]', r"mirror\[0\] has no location"),
        (
            '[[registry]]\nlocation = "r.example"\n[[registry.mirror]]\nlocation = "http://m.example"',
            r"mirror\[0\]: location has a scheme",
        ),
        (
            '[[registry]]\nlocation = "r.example"\n[[registry.mirror]]\nlocation = "m.example"\n'
            'pull-from-mirror = "never"',
            "none of all, digest-only, tag-only: 'never'",
        ),
        (
            '[[registry]]\nlocation = "r.example"\nmirror-by-digest-only = true\n'
            '[[registry.mirror]]\nlocation = "m.example"\npull-from-mirror = "all"',
            "and its registry mirror-by-digest-only",
        ),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(Invalid, match=message) as caught:
        parse(text)
    assert caught.value.message.startswith(str(PATH))


def test_what_is_for_short_names_is_not_read() -> None:
    assert parse('unqualified-search-registries = ["r.example"]\n[aliases]\na = "r.example/a"') == {}


def test_unknown_keys_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse("""
            [[registry]]
            location = "r.example"
            blockd = true
            [[registry.mirror]]
            location = "m.example"
            mirror-by-digest-only = true
        """)
    assert len(caplog.records) == 1
    assert f"{PATH}: registry[0].blockd" in caplog.text
    assert "registry[0].mirror[0].mirror-by-digest-only" in caplog.text


def made(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_drop_ins_of_the_system_and_then_the_users_overrule_the_systems_file(tmp_path: Path) -> None:
    system, user = tmp_path / "etc/containers", tmp_path / "home/.config/containers"
    (system / "registries.conf.d/folder.conf").mkdir(parents=True)
    drop_ins = [system / "registries.conf.d" / name for name in ("10.conf", "9.conf", "a.conf")]
    mine = user / "registries.conf.d/0.conf"
    made(*drop_ins, mine, system / "registries.conf.d/b.conf.bak")
    assert containers.files(tmp_path, tmp_path / "home", {}) == [system / "registries.conf", *drop_ins, mine]


def test_the_users_file_stands_for_all_of_the_systems(tmp_path: Path) -> None:
    system, user = tmp_path / "etc/containers", tmp_path / "home/.config/containers"
    mine = [user / "registries.conf", user / "registries.conf.d/0.conf"]
    made(*mine, system / "registries.conf", system / "registries.conf.d/a.conf")
    assert containers.files(tmp_path, tmp_path / "home", {}) == mine


def test_a_file_in_the_place_of_a_folder_holds_no_drop_ins(tmp_path: Path) -> None:
    system = tmp_path / "etc/containers"
    made(system / "registries.conf.d")
    assert containers.files(tmp_path, tmp_path / "home", {}) == [system / "registries.conf"]


@pytest.mark.parametrize("variable", ["CONTAINERS_REGISTRIES_CONF", "REGISTRIES_CONFIG_PATH"])
def test_the_environment_may_name_the_file_and_the_drop_ins_still_count(
    tmp_path: Path, variable: str
) -> None:
    named, system = tmp_path / "named.conf", tmp_path / "etc/containers/registries.conf.d/a.conf"
    mine = tmp_path / "home/.config/containers/registries.conf"
    made(named, system, mine)
    environ = {variable: os.fspath(named)}
    assert containers.files(tmp_path, tmp_path / "home", environ) == [named, system]
    named.unlink()
    with pytest.raises(UsageError, match=variable):
        containers.files(tmp_path, tmp_path / "home", environ)
