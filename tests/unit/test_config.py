import os
from pathlib import Path

import pytest

from fsmount import configfile
from fsmount.config import Config
from fsmount.configfile import find_config, load_config
from fsmount.errors import UsageError
from fsmount.oci.platform import Platform
from fsmount.oci.reference import LayoutReference, Reference
from fsmount.policy import Complete, Indexes

WEB = 'repository = "registry.example.com/team/web"\n'


@pytest.fixture(autouse=True)
def no_system_file(monkeypatch, tmp_path):
    monkeypatch.setattr(configfile, "SYSTEM_FILE", tmp_path / "etc/config.toml")


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.toml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def load(write):
    return lambda text, **options: load_config(write(text), environ={}, **options)


@pytest.fixture
def problems(load, tmp_path):
    """The problems of a file, one text each, without the file's folder."""

    def problems(text, **options):
        with pytest.raises(UsageError) as raised:
            load(text, **options)
        lines = raised.value.message.replace(f"{tmp_path}/", "").split("\n")
        if len(lines) > 1:
            assert lines[0] == f"the configuration has {len(lines) - 1} problems:"
        return lines[1:] if len(lines) > 1 else lines

    return problems


@pytest.fixture
def problem(problems):
    def problem(text, **options):
        (only,) = problems(text, **options)
        return only

    return problem


class TestWhatIsInForce:
    def test_without_a_file_the_defaults_are_in_force(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        config = load_config(environ={})
        assert config.mountpoint == Path("/srv/artifacts")
        assert config.cache.path == Path("/var/cache/fsmount")
        assert config.cache.size == 20_000_000_000
        assert config.cache.max_layer_size is None
        assert config.defaults.refresh_seconds == 60
        assert config.defaults.platform == Platform.current()
        assert not config.apps
        assert not config.registries

    def test_a_file_sets_every_key(self, load):
        config = load("""
            mountpoint = "/mnt/builds"
            [cache]
            path = "/data/cache"
            size = "1.5 TB"
            max_layer_size = "512 MiB"
            [defaults]
            refresh = "5m"
            platform = "linux/amd64"
            [apps.web]
            repository = "registry.example.com/team/web"
            path = "//buildOutput/./dist/"
            platform = "linux/aarch64"
            tags = ["v*", "main"]
            refresh = "500ms"
            [registries."localhost:5000"]
            plain_http = true
            username = "robot$ci"
            password_file = "//etc/fsmount/password"
            [registries."a.example"]
            helper = "ecr-login"
            [registries."b.example"]
            anonymous = true
        """)
        assert config.mountpoint == Path("/mnt/builds")
        assert config.cache.path == Path("/data/cache")
        assert config.cache.size == 1_500_000_000_000
        assert config.cache.max_layer_size == 512 * 1024 * 1024
        web = config.apps["web"]
        assert web.repository == Reference("registry.example.com", "team/web")
        assert web.path == "/buildOutput/dist"
        assert web.platform == Platform("linux", "arm64")
        assert web.tags == ("v*", "main")
        assert web.refresh_seconds == 0.5
        local = config.registries["localhost:5000"]
        assert local.plain_http
        assert (local.username, local.password_file) == ("robot$ci", Path("/etc/fsmount/password"))
        assert config.registries["a.example"].helper == "ecr-login"
        assert config.registries["b.example"].anonymous

    def test_an_app_takes_from_the_defaults_what_it_does_not_say(self, load):
        config = load(
            f'[defaults]\nrefresh = "1h"\nplatform = "linux/arm/v6"\n[apps.a]\n{WEB}[apps.b]\n{WEB}refresh = "60s"\n'
        )
        assert config.apps["a"].refresh_seconds == 3600
        assert config.apps["a"].platform == Platform("linux", "arm", "v6")
        assert config.apps["b"].refresh_seconds == 60

    def test_what_may_be_read_by_indexes_and_fetched_unasked_is_any_and_in_idle_times(self, load):
        config = load(f"[apps.a]\n{WEB}")
        for table in (config.defaults, config.apps["a"]):
            assert (table.indexes, table.complete) == (Indexes.ANY, Complete.IDLE)

    @pytest.mark.parametrize("indexes", Indexes)
    @pytest.mark.parametrize("complete", Complete)
    def test_an_app_has_its_policies_from_the_defaults_unless_it_says_otherwise(
        self, load, indexes, complete
    ):
        policies = f'indexes = "{indexes}"\ncomplete = "{complete}"\n'
        config = load(f"[defaults]\n{policies}[apps.a]\n{WEB}")
        for table in (config.defaults, config.apps["a"]):
            assert (table.indexes, table.complete) == (indexes, complete)
        config = load(f'[defaults]\nindexes = "off"\ncomplete = "now"\n[apps.a]\n{WEB}{policies}')
        assert (config.apps["a"].indexes, config.apps["a"].complete) == (indexes, complete)
        assert (config.defaults.indexes, config.defaults.complete) == (Indexes.OFF, Complete.NOW)

    def test_of_two_policies_each_is_inherited_by_itself(self, load):
        config = load(f'[defaults]\nindexes = "bound"\ncomplete = "never"\n[apps.a]\n{WEB}indexes = "any"\n')
        assert (config.apps["a"].indexes, config.apps["a"].complete) == (Indexes.ANY, Complete.NEVER)

    def test_what_is_fetched_in_the_background_has_no_bound_unless_there_is_a_rate(self, load):
        assert load("").network.background_rate is None
        assert load('[network]\nbackground_rate = "2.5 MB"\n').network.background_rate == 2_500_000

    def test_an_app_may_be_a_layout_folder(self, load):
        config = load('[apps.web]\nrepository = "oci-layout:/srv/builds"\n')
        assert config.apps["web"].repository == LayoutReference(Path("/srv/builds"))

    def test_an_app_shows_all_tags_or_those_that_match_a_pattern(self, load):
        config = load(f'[apps.a]\n{WEB}[apps.b]\n{WEB}tags = ["v[0-9]*", "main"]\n')
        assert config.apps["a"].shows("anything")
        assert [tag for tag in ("v1", "vx", "main", "maintenance") if config.apps["b"].shows(tag)] == [
            "v1",
            "main",
        ]

    @pytest.mark.parametrize(
        "written, size",
        [
            ("4096", 4096),
            ('"20 GB"', 20 * 10**9),
            ('"20gb"', 20 * 10**9),
            ('"1 kB"', 1000),
            ('"0.5 GiB"', 2**29),
            ('"7 B"', 7),
        ],
    )
    def test_a_size_is_a_number_with_a_unit_or_of_bytes(self, load, written, size):
        assert load(f"cache.size = {written}").cache.size == size

    @pytest.mark.parametrize(
        "written, seconds",
        [("60s", 60), ("5m", 300), ("1h", 3600), ("500ms", 0.5), ("1 d", 86400), ("1.5s", 1.5)],
    )
    def test_a_time_is_a_number_with_a_unit(self, load, written, seconds):
        assert load(f'defaults.refresh = "{written}"').defaults.refresh_seconds == seconds

    def test_a_registry_is_left_to_docker_and_podman_unless_it_says_who_we_are(self, load):
        registry = load("[registries.a]\n").registries["a"]
        assert (registry.username, registry.password_file, registry.helper) == (None, None, None)
        assert not registry.anonymous

    def test_a_password_file_may_be_a_systemd_credential(self, load):
        written = '[registries.a]\nusername = "u"\npassword_file = "registry.token"\n'
        assert load(written).registries["a"].password_file == Path("registry.token")

    def test_a_configuration_cannot_be_changed(self, load):
        config = load(f"[apps.web]\n{WEB}")
        with pytest.raises(ValueError, match="frozen"):
            config.mountpoint = Path("/")
        with pytest.raises(TypeError):
            config.apps["other"] = config.apps["web"]

    def test_a_configuration_can_be_made_without_a_file(self):
        config = Config.model_validate(
            {"cache": {"path": "/c"}, "apps": {"web": {"repository": "oci-layout:/b", "refresh": "1s"}}}
        )
        assert config.apps["web"].refresh_seconds == 1


class TestWhereItComesFrom:
    def test_a_path_wins_over_the_environment(self, write):
        environ = {"FSMOUNT_CONFIG": str(write('mountpoint = "/env"', "env.toml"))}
        assert load_config(environ=environ).mountpoint == Path("/env")
        assert load_config(write('mountpoint = "/path"'), environ=environ).mountpoint == Path("/path")

    def test_the_environment_wins_over_the_system_file(self, write):
        environ = {"FSMOUNT_CONFIG": str(write('mountpoint = "/env"', "env.toml"))}
        write('mountpoint = "/system"', "etc/config.toml")
        assert load_config(environ={}).mountpoint == Path("/system")
        assert load_config(environ=environ).mountpoint == Path("/env")

    def test_a_user_has_a_file_of_her_own_and_root_has_not(self, monkeypatch, write, tmp_path):
        system = write("", "etc/config.toml")
        own = write("", ".config/fsmount/config.toml")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert find_config(None, {"HOME": str(tmp_path)}) == own
        assert (
            find_config(None, {"HOME": "/nonexistent", "XDG_CONFIG_HOME": str(tmp_path / ".config")}) == own
        )
        assert find_config(None, {"HOME": "/nonexistent"}) == system
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert find_config(None, {"HOME": str(tmp_path)}) == system

    def test_the_cache_of_a_user_is_in_her_cache_folder(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert load_config(environ={"HOME": "/home/u"}).cache.path == Path("/home/u/.cache/fsmount")
        environ = {"HOME": "/home/u", "XDG_CACHE_HOME": "/fast"}
        assert load_config(environ=environ).cache.path == Path("/fast/fsmount")

    def test_a_relative_XDG_folder_is_ignored(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        environ = {"HOME": "/home/u", "XDG_CACHE_HOME": "fast"}
        assert load_config(environ=environ).cache.path == Path("/home/u/.cache/fsmount")

    def test_the_cache_is_that_of_the_option_else_the_environment_else_the_file(
        self, write, monkeypatch, tmp_path
    ):
        monkeypatch.chdir(tmp_path)
        path = write('cache.path = "/file"')
        environ = {"FSMOUNT_CACHE": "env"}
        assert load_config(path, environ={}).cache.path == Path("/file")
        assert load_config(path, environ=environ).cache.path == tmp_path / "env"
        assert load_config(path, environ=environ, cache=Path("option")).cache.path == tmp_path / "option"

    def test_an_empty_variable_counts_as_unset(self):
        assert find_config(None, {"FSMOUNT_CONFIG": ""}) is None

    def test_an_app_option_adds_an_app(self, load, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        config = load("", apps={"team/web": "registry.example.com/web", "local": "oci-layout:builds"})
        assert config.apps["team/web"].repository == Reference("registry.example.com", "web")
        assert config.apps["local"].repository == LayoutReference(tmp_path / "builds")

    def test_an_app_option_replaces_only_the_repository_of_an_app(self, load):
        config = load(f'[apps.web]\n{WEB}path = "/dist"\n', apps={"web": "mirror.example.com/web"})
        assert config.apps["web"].repository == Reference("mirror.example.com", "web")
        assert config.apps["web"].path == "/dist"


class TestWhatIsRefused:
    def test_all_problems_are_told_at_once_in_the_order_of_the_file(self, problems):
        assert problems("""\
mountpoint = "srv"
# a comment
[cache]
size = "20 XB"
[apps.web]
tgas = ["v*"]
path = "../etc"
""") == [
            "config.toml:1: mountpoint: must be an absolute path; write it from the root, like /srv/artifacts",
            'config.toml:4: cache.size: must be a size above zero; write "20 GB", "512 MiB" or a number of bytes',
            "config.toml:5: apps.web.repository: is missing; "
            'add repository = "registry.example.com/team/web"',
            "config.toml:6: apps.web.tgas: unknown key; did you mean tags?",
            'config.toml:7: apps.web.path: must be a folder of the image; write it from the root, without "..", '
            'like "/dist"',
        ]

    def test_the_line_of_a_key_is_found_however_it_is_written(self, problems):
        found = problems('''\
defaults . "refresh" = "1 fortnight"
registries = { "localhost:5000" = { plain_http = "yes" } }
cache.size = """
[apps.web]
"""

[apps."team/web"] # not = "a key"
repository = "a.example/b"
tags = [
    "[x]", # ]
    "",
]
path = "x"\r
platform = "?"
''')
        assert [text.split(": ")[:2] for text in found] == [
            ["config.toml:1", "defaults.refresh"],
            ["config.toml:2", 'registries."localhost:5000".plain_http'],
            ["config.toml:3", "cache.size"],
            ["config.toml:9", 'apps."team/web".tags'],
            ["config.toml:13", 'apps."team/web".path'],
            ["config.toml:14", 'apps."team/web".platform'],
        ]

    @pytest.mark.parametrize(
        "text, line",
        [
            ("[cache]\nsize = 20 GB\n", 2),
            ('[cache]\n\nsize = "20 GB\n', 3),
            ("[apps.web]\n[apps.web]\n", 2),
            ("[cache]\ntags = [\n", 3),
        ],
    )
    def test_a_syntax_error_names_its_line(self, problem, text, line):
        assert problem(text).startswith(f"config.toml:{line}: ")

    def test_a_byte_that_is_not_UTF_8_is_named_with_its_line(self, problem):
        assert problem(b'# fine\nmountpoint = "/caf\xe9"\n') == "config.toml:2: byte 0xe9 is not UTF-8"

    def test_a_file_that_is_asked_for_and_absent_is_an_error(self, tmp_path):
        with pytest.raises(UsageError, match=r"absent\.toml cannot be read: No such file"):
            load_config(tmp_path / "absent.toml", environ={})

    def test_an_unknown_key_that_is_near_to_none_is_told_what_there_is(self, problem):
        assert problem("[registries.x]\nmirror = 1\n").endswith(
            "unknown key; known here: plain_http, username, password_file, helper, anonymous"
        )
        assert problem("[network]\ntrys = 2\n").endswith("network.trys: unknown key; did you mean tries?")

    def test_a_nested_table_for_an_app_with_a_slash_is_told_how_to_write_it(self, problems):
        found = problems(f"[apps.team.web]\n{WEB}")
        assert (
            'config.toml:1: apps.team.web: unknown key; an app name with a slash goes in quotes: [apps."team/web"]'
            in found
        )

    @pytest.mark.parametrize(
        "name", ["", "/", "a//b", "/a", "a/", ".", "a/../b", "a\\u0000", "x" * 256, "é" * 128]
    )
    def test_an_app_is_named_by_folder_names(self, problem, name):
        assert "is no folder name; an app is named like web or team/web" in problem(f'[apps."{name}"]\n{WEB}')

    @pytest.mark.parametrize("name", ["team/web", "a/b/c", "x" * 255, ".hidden", "été"])
    def test_an_app_name_may_hold_what_a_folder_name_may(self, load, name):
        assert list(load(f'[apps."{name}"]\n{WEB}').apps) == [name]

    def test_no_app_is_inside_another(self, problem, load):
        text = f'[apps."team/web/x"]\n{WEB}[apps.team]\n{WEB}[apps.teams]\n{WEB}'
        assert problem(text) == (
            'config.toml:1: apps."team/web/x": is inside the app team, where its tags are; rename one of the two'
        )
        assert len(load(f'[apps."team/web"]\n{WEB}[apps."team/api"]\n{WEB}').apps) == 2

    def test_an_option_that_is_wrong_is_told_by_its_name(self, problems):
        found = problems(
            f"[apps.web]\n{WEB}",
            apps={"web/x": "a b", "web": "a.example/b:v1"},
            cache=Path("/srv/artifacts/c"),
        )
        assert [text.split(": ")[:2] for text in found] == [
            ["--app web", "apps.web.repository"],
            ["--app web/x", 'apps."web/x".repository'],
            ["--app web/x", 'apps."web/x"'],
            ["--cache", "cache"],
        ]

    @pytest.mark.parametrize(
        "repository, reason",
        [
            ('"registry.example.com/web:v1"', "names the version v1"),
            ('"oci-layout:/srv/builds:v1"', "names the version v1"),
            ('"oci-layout:builds"', "the folder 'builds' is relative; write it from the root"),
            ('"https://registry.example.com/web"', "is no image reference"),
            ("7", "must be a repository"),
        ],
    )
    def test_a_repository_is_without_version_and_from_the_root(self, problem, repository, reason):
        text = problem(f"[apps.web]\nrepository = {repository}\n")
        assert text.startswith("config.toml:2: apps.web.repository: ")
        assert reason in text

    @pytest.mark.parametrize(
        "written", ["true", "0", "-1", '"0 GB"', '"20"', '"GB"', '"1e3"', '""', "1.5", '"٣ GB"', "[]"]
    )
    def test_what_is_no_size_is_refused(self, problem, written):
        assert "must be a size above zero" in problem(f"cache.size = {written}")

    @pytest.mark.parametrize("written", ["60", '"60"', '"0s"', '"-1s"', '"1y"', '"1h30m"'])
    def test_what_is_no_time_is_refused(self, problem, written):
        assert "must be a time above zero" in problem(f"defaults.refresh = {written}")

    @pytest.mark.parametrize("written", ['"all"', '"ANY"', '""', "true", "1", '["any"]'])
    @pytest.mark.parametrize("table", ["defaults", "apps.web"])
    def test_what_is_no_policy_is_refused_and_told_what_there_is(self, problems, table, written):
        repository = WEB if table == "apps.web" else "\n"
        assert problems(f"[{table}]\n{repository}indexes = {written}\ncomplete = {written}\n") == [
            f'config.toml:3: {table}.indexes: must be "any", "bound" or "off"',
            f'config.toml:4: {table}.complete: must be "idle", "now" or "never"',
        ]

    @pytest.mark.parametrize("written", ["0", '"0 MB"', '"fast"', "true"])
    def test_what_is_no_rate_is_refused(self, problem, written):
        text = problem(f"[network]\nbackground_rate = {written}\n")
        assert text.startswith("config.toml:2: network.background_rate: must be a size above zero")

    @pytest.mark.parametrize("written", ['"v*"', "[]", '[""]', "[1]"])
    def test_what_is_no_list_of_patterns_is_refused(self, problem, written):
        assert "must be a list of patterns" in problem(f"[apps.web]\n{WEB}tags = {written}\n")

    def test_what_should_be_a_table_and_is_none_is_refused(self, problems):
        assert [text.split(": ", 2)[2] for text in problems('cache = 1\napps = "x"\nregistries.x = 2\n')] == [
            "must be a table; write it as a header in brackets, and its keys below",
            "must hold tables; write each as a header in brackets, and its keys below",
            "must be a table; write it as a header in brackets, and its keys below",
        ]

    def test_a_value_that_is_not_true_or_false_is_refused(self, problem):
        assert problem('[registries.x]\nplain_http = "true"\n').endswith(
            "must be true or false; write it without quotes"
        )

    @pytest.mark.parametrize("host", ["http://x", "x/y", "", "x:", "a b"])
    def test_a_registry_is_named_by_host_and_port(self, problem, host):
        assert "is no registry" in problem(f'[registries."{host}"]\n')

    @pytest.mark.parametrize(
        "written, reason",
        [
            ('username = ""', "must be a user name"),
            ('username = "u:p"', "must be a user name"),
            ('username = "u\\n"', "must be a user name"),
            ('password_file = "etc/password"', "must be a file; write it from the root"),
            ('password_file = ".."', "must be a file; write it from the root"),
            ("password_file = 1", "must be a file; write it from the root"),
            ('helper = "docker credential"', "must be what follows docker-credential-"),
            ('helper = "../x"', "must be what follows docker-credential-"),
            ('helper = ""', "must be what follows docker-credential-"),
            ('anonymous = "yes"', "must be true or false"),
        ],
    )
    def test_who_we_are_at_a_registry_has_a_form(self, problem, written, reason):
        text = problem(f"[registries.x]\n{written}\n")
        assert text.startswith(f"config.toml:2: registries.x.{written.partition(' ')[0]}: {reason}")

    @pytest.mark.parametrize(
        "written, reason",
        [
            ('username = "u"', "has username and no password_file; write both, or neither"),
            ('password_file = "/p"', "has password_file and no username; write both, or neither"),
            (
                'helper = "x"\nanonymous = true',
                "has helper and anonymous, which exclude each other; keep one",
            ),
            (
                'username = "u"\npassword_file = "/p"\nhelper = "x"',
                "has username and helper, which exclude each other; keep one",
            ),
        ],
    )
    def test_at_a_registry_we_are_one_user(self, problem, written, reason):
        assert problem(f"\n[registries.x]\n{written}\n") == f"config.toml:2: registries.x: {reason}"

    def test_a_password_in_the_configuration_is_refused_and_not_repeated(self, problem):
        text = problem('[registries.x]\nusername = "u"\npassword = "s3cret"\n')
        assert "unknown key; did you mean password_file?" in text
        assert "s3cret" not in text

    def test_the_cache_is_not_inside_the_mount(self, problem):
        assert problem('mountpoint = "/m"\n[cache]\npath = "/m/cache"\n') == (
            "config.toml:2: cache: path /m/cache is inside the mount point /m; choose one outside"
        )
