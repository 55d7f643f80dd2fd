"""What is said to have changed between two configurations, and what of that a running process takes over."""

from pathlib import Path

import pytest

from fsmount.change import ReloadReport, applicable, compare
from fsmount.config import Config
from fsmount.configfile import load_config

BEFORE = """
mountpoint = "/srv/artifacts"
[cache]
path = "/var/cache/fsmount"
size = "20 GB"
[defaults]
refresh = "60s"
[network]
tries = 3
[apps.web]
repository = "registry.example.com/team/web"
tags = ["v*"]
[apps.blog]
repository = "registry.example.com/team/blog"
[registries."registry.example.com"]
anonymous = true
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(BEFORE)
    return path


def load(path: Path, *replaced: tuple[str, str], more: str = "") -> Config:
    text = BEFORE
    for before, after in replaced:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text + more)
    return load_config(path, environ={})


REPORTS = [
    ([], "", ReloadReport()),
    ([('tags = ["v*"]', 'tags = ["main"]')], "", ReloadReport(changed=("web",))),
    ([('team/blog"', 'team/news"')], "", ReloadReport(changed=("blog",))),
    (
        [("apps.blog", "apps.news")],
        '[apps.a]\nrepository = "example.com/a"\n',
        ReloadReport(added=("a", "news"), removed=("blog",)),
    ),
    # What apps inherit changes them.
    ([('"60s"', '"90s"')], "", ReloadReport(changed=("blog", "web"), settings=("defaults.refresh",))),
    (
        [('"20 GB"', '"10 GB"\nmin_free = 0'), ("tries = 3", 'tries = 5\nconnect_timeout = "5s"')],
        '[deadlines]\nnames = "5s"\n[metrics]\ntextfile = "/run/fsmount.prom"\n',
        ReloadReport(
            settings=(
                "cache.size",
                "cache.min_free",
                "network.connect_timeout",
                "network.tries",
                "deadlines.names",
            ),
            needs_restart=("metrics.textfile",),
        ),
    ),
    (
        [("anonymous = true", "plain_http = true")],
        '[registries."localhost:5000"]\nplain_http = true\n',
        ReloadReport(settings=('registries."localhost:5000"', 'registries."registry.example.com"')),
    ),
    (
        [('"/srv/artifacts"', '"/mnt"'), ('cache/fsmount"', 'cache/other"\nmax_layer_size = "1 GB"')],
        "",
        ReloadReport(needs_restart=("mountpoint", "cache.path", "cache.max_layer_size")),
    ),
]


@pytest.mark.parametrize(("replaced", "more", "report"), REPORTS)
def test_every_key_that_differs_is_named_as_the_file_spells_it(
    path: Path, replaced: list[tuple[str, str]], more: str, report: ReloadReport
) -> None:
    old = load(path)
    new = load(path, *replaced, more=more)
    assert compare(old, new) == report
    assert compare(new, new) == ReloadReport()


def test_what_needs_a_restart_stays_as_it_was_and_is_named_until_then(path: Path) -> None:
    old = load(path)
    new = load(
        path,
        ('"/srv/artifacts"', '"/mnt"'),
        ('cache/fsmount"', 'cache/other"\nmax_layer_size = "1 GB"'),
        ('"20 GB"', '"10 GB"'),
    )
    taken = applicable(old, new)
    assert (taken.mountpoint, taken.cache.path, taken.cache.max_layer_size) == (
        Path("/srv/artifacts"),
        Path("/var/cache/fsmount"),
        None,
    )
    assert taken.cache.size == 10 * 10**9
    assert compare(taken, new).needs_restart == ("mountpoint", "cache.path", "cache.max_layer_size")
    assert compare(old, taken) == ReloadReport(settings=("cache.size",))
