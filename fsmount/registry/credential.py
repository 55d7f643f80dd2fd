"""Credential: who we say we are, in the three forms that registries and token servers take."""

from dataclasses import dataclass, field

#: The user name that stands for an identity token, in the answers of credential helpers.
_TOKEN_USER = "<token>"
#: Azure's: `az acr login` and Kubernetes keep a refresh token as this user's password.
_NULL_USER = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Password:
    """A user and a password, for Basic, or to be exchanged for a token."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class IdentityToken:
    """A refresh token, to be exchanged for an access token by POST."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class RegistryToken:
    """An access token, ready for use."""

    token: str = field(repr=False)


Credential = Password | IdentityToken | RegistryToken


def from_login(username: str, secret: str) -> Credential:
    """What a user name and a secret amount to: for two names, the secret is no password."""
    if username in (_TOKEN_USER, _NULL_USER):
        return IdentityToken(secret)
    return Password(username, secret)
