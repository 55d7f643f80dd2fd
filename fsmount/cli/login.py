"""login: keeps a user and password where docker, podman and fsmount find them, once the registry has taken them."""

import sys
from pathlib import Path

import click

from fsmount.cli.output import printable
from fsmount.errors import UsageError
from fsmount.oci.reference import Reference

#: Which file is meant, for login and logout.
authfile_option = click.option(
    "--authfile",
    metavar="FILE",
    envvar="REGISTRY_AUTH_FILE",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="The file of credentials.  [default: docker's config.json]",
)


@click.command()
@click.argument("registry", default="docker.io")
@click.option("--username", "-u", metavar="USER", help="Asked for if it is not given.")
@click.option("--password-stdin", is_flag=True, help="Take the password from standard input.")
@authfile_option
@click.option(
    "--config",
    metavar="FILE",
    envvar="FSMOUNT_CONFIG",
    show_envvar=True,
    type=click.Path(path_type=Path),
    help="Says how the registry is reached.  [default: /etc/fsmount/config.toml, if it exists]",
)
def login(
    registry: str, username: str | None, password_stdin: bool, authfile: Path | None, config: Path | None
) -> None:
    """Check a user and password with REGISTRY, and keep them.

    They go to the credential helper that the file names, else into the file. REGISTRY is written as in references,
    host:port; without it, Docker Hub is meant.
    """
    import trio

    from fsmount.configfile import load_config
    from fsmount.registry.login import LoginFile, check_login

    domain = domain_of(registry)
    table = load_config(config).registries.get(domain)
    file = LoginFile(authfile)
    helper = file.keeper(domain)  # a broken file is told of before anything is typed
    user, password = _ask(username, password_stdin)

    async def main() -> bool:
        plain_http = table is not None and table.plain_http
        is_checked = await check_login(domain, user, password, plain_http=plain_http)
        await file.keep(domain, user, password)
        return is_checked

    is_checked = trio.run(main)
    keeper = f"docker-credential-{helper}" if helper else file.path
    click.echo(printable(f"{domain}: logged in as {user}; kept in {keeper}"))
    if not is_checked:
        text = f"fsmount: warning: {domain} asks nobody for a password, so it was not checked"
        click.echo(printable(text), err=True)


def domain_of(registry: str) -> str:
    """A registry as references name it; docker's URLs are understood. Raises: UsageError."""
    from fsmount.registry.authfile import normal_key

    domain = normal_key(registry)
    try:
        is_registry = Reference.parse(f"{domain}/x").domain == domain
    except UsageError:
        is_registry = False
    if not is_registry:
        raise UsageError(
            f"{registry[:300]!r} is no registry",
            remedy="Write its host and port as in references, like registry.example.com or localhost:5000.",
        )
    return domain


def _ask(username: str | None, password_stdin: bool) -> tuple[str, str]:
    """The user and password, from the options, standard input and the terminal. Raises: UsageError."""
    if password_stdin:
        if not username:
            raise UsageError("--password-stdin leaves nothing to ask for the user: give --username too")
        password = _from_stdin()
    elif not sys.stdin.isatty():
        raise UsageError(
            "there is no terminal to ask for the password at",
            remedy="Give it on standard input: fsmount login REGISTRY -u USER --password-stdin <FILE",
        )
    else:
        username = username or click.prompt("Username", err=True)
        password = click.prompt("Password", hide_input=True, err=True)
    if ":" in username:
        raise UsageError(
            f"the user name {username!r} has a colon, which no registry can tell from the password's"
        )
    if not password:
        raise UsageError("the password is empty")
    return username, password


def _from_stdin() -> str:
    """All of it, but the end of the line that `echo` or an editor adds."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise UsageError("the password on standard input is not UTF-8") from None
