"""version: which fsmount this is."""

import click

from fsmount import __version__


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(f"fsmount {__version__}")
