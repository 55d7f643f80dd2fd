"""inspect: what an image is made of: manifest, layers, how each is read, and how much of it is here."""

import json

import click

from fsmount.cli.options import ConfigOptions, config_options
from fsmount.cli.output import printable


@click.command()
@click.argument("source")
@click.option("--platform", metavar="OS/ARCH", envvar="FSMOUNT_PLATFORM", help="Of a multi-platform image.")
@click.option("--json", "as_json", is_flag=True, envvar="FSMOUNT_JSON", help="For programs.")
@config_options
def inspect(options: ConfigOptions, source: str, platform: str | None, as_json: bool) -> None:
    """Show what SOURCE is made of. Nothing is fetched but the manifest and the configuration."""
    from fsmount.catalog import Content
    from fsmount.cli import browse
    from fsmount.engine import Engine
    from fsmount.layer import Layer
    from fsmount.status import cached_size

    def layer_facts(layer: Layer) -> dict[str, object]:
        descriptor = layer.spec.descriptor
        index = layer.index
        facts: dict[str, object] = {
            "digest": str(descriptor.digest),
            "media_type": descriptor.media_type,
            "size": descriptor.size,
            "kind": "file" if layer.spec.title is not None else "unknown until it is read",
            "indexed": index is not None,
        }
        if index is not None:
            stored = layer.stored_chunks()
            here = cached_size(index, stored)
            if layer.spec.title is None:
                facts["kind"] = str(index.facts["compression"])
            facts |= {
                "read_as": str(index.kind),
                "trust": str(index.trust),
                "reason": index.reason or None,
                "inflated_size": index.inflated_size,
                "diff_id": index.diff_id,
                "members": index.members,
                "chunks": len(index.chunks),
                "cached_chunks": sum(stored),
                # Of the blob; None where no part of it can be had alone.
                "cached_size": None if here is None else min(here, descriptor.size),
            }
        return facts

    async def command(engine: Engine, content: Content) -> None:
        image = content.image
        facts = {
            "version": 1,
            "digest": str(image.digest),
            "media_type": image.manifest.media_type,
            "platform": str(image.config.platform) if image.config and image.config.platform else None,
            "created": image.created.isoformat() if image.created else None,
            "size": sum(layer.spec.descriptor.size for layer in content.tree.layers),
            "layers": [layer_facts(layer) for layer in content.tree.layers],
        }
        click.echo(json.dumps(facts, indent=2) if as_json else printable(_table(facts)))

    # Looking for an app's folder would fetch a layer.
    browse.run(options, source, command, platform=platform, path="/")


def _table(facts: dict[str, object]) -> str:
    lines = [
        f"{key:<11} {facts[key]}" for key in ("digest", "media_type", "platform", "created") if facts[key]
    ]
    layers = facts["layers"]
    assert isinstance(layers, list)
    lines.append(f"{'size':<11} {facts['size']} bytes in {len(layers)} layers, lowest first:")
    for layer in layers:
        lines.append(f"  {layer['digest']}  {layer['size']} bytes, {layer['kind']}")
        if layer["indexed"]:
            lines.append(
                f"    {layer['members']} members, {layer['inflated_size']} bytes inflated,"
                f" {layer['cached_chunks']} of {layer['chunks']} chunks cached"
            )
            text = f"    {layer['trust']}, read as {layer['read_as']}"
            if layer["reason"]:
                text += f" because {layer['reason']}"
            if layer["cached_size"] is not None:
                text += f"; {layer['size'] - layer['cached_size']} bytes need not be here"
            lines.append(text)
    return "\n".join(lines)
