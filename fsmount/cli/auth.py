"""auth: tells where the credentials for a registry come from, and shows none of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from fsmount.cli.login import domain_of
from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable
from fsmount.oci.reference import Reference

if TYPE_CHECKING:
    from fsmount.registry.credential import Credential
    from fsmount.registry.credentials import Explanation


@click.command()
@click.argument("registry", metavar="REGISTRY[/REPOSITORY]")
@click.option("--json", "as_json", is_flag=True, envvar="FSMOUNT_JSON", help="For programs.")
@config_options
def auth(options: ConfigOptions, registry: str, as_json: bool) -> None:
    """Show which places are asked for credentials, in order, and which one has them. No secret is shown."""
    import trio

    from fsmount.registry.credentials import Credentials

    if "/" in registry and "://" not in registry:
        reference = Reference.parse(registry)
        domain, repository = reference.domain, reference.repository
    else:
        domain, repository = domain_of(registry), ""
    credentials = Credentials(options.load().registries)
    explanation = trio.run(credentials.explain, domain, repository)
    name = f"{domain}/{repository}" if repository else domain
    click.echo(_as_json(name, explanation) if as_json else printable(_table(name, explanation)))


def _as_json(name: str, explanation: Explanation) -> str:
    match = explanation.match
    facts: dict[str, object] = {
        "version": 1,
        "name": name,
        "places": [
            {"source": step.source, "where": step.where, "result": step.result.name.lower()}
            for step in explanation.steps
        ],
        "key": match.key if match else None,
        "helper": match.helper if match else None,
        "credential": None,
    }
    if match and match.credential:
        kind, username = _described(match.credential)
        facts["credential"] = {"kind": kind, "username": username}
    return json.dumps(facts, indent=2)


def _table(name: str, explanation: Explanation) -> str:
    rows = [(step.source, step.where, step.result.value) for step in explanation.steps]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{source:<{widths[0]}}  {where:<{widths[1]}}  {result}" for source, where, result in rows]
    return "\n".join([*lines, "", _verdict(name, explanation)])


def _verdict(name: str, explanation: Explanation) -> str:
    match = explanation.match
    if match is None:
        return f"{name}: nobody has credentials; it is used anonymously"
    where = next(step.where or step.source for step in explanation.steps if step.result.name == "USED")
    if match.credential is None:
        return f"{name}: anonymous, as {where} wants it"
    kind, username = _described(match.credential)
    who = f"{kind} of {username}" if username else kind
    place = f"{match.helper}, which {where} names" if match.helper else where
    return f"{name}: {who}, from {place}, under the key {match.key}"


def _described(credential: Credential) -> tuple[str, str | None]:
    """Kind and user name of a credential."""
    from fsmount.registry.credential import IdentityToken, Password

    if isinstance(credential, Password):
        return "password", credential.username
    return ("identity token" if isinstance(credential, IdentityToken) else "registry token"), None
