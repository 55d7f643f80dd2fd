"""logout: erases what login kept."""

from pathlib import Path

import click

from fsmount.cli.login import authfile_option, domain_of
from fsmount.cli.output import printable


@click.command()
@click.argument("registry", default="docker.io")
@authfile_option
def logout(registry: str, authfile: Path | None) -> None:
    """Erase what is kept for REGISTRY, in the file and in the credential helper that it names.

    Other files may have more: fsmount auth REGISTRY tells.
    """
    import trio

    from fsmount.registry.login import LoginFile

    domain = domain_of(registry)
    file = LoginFile(authfile)
    places = trio.run(file.forget, domain)
    for place in places:
        click.echo(printable(f"{domain}: removed from {place}"))
    if not places:
        click.echo(printable(f"{domain}: nothing is kept for it in {file.path}"))
