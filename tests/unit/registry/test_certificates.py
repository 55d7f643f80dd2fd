"""What a folder of certs.d holds."""

import logging
from pathlib import Path

import pytest

from fsmount.errors import UsageError
from fsmount.registry import certificates
from fsmount.registry.endpoint import ClientCertificate, Tls

FOLDER = Path("/certs.d/r.example:5000")


def test_the_users_folder_comes_before_podmans_and_podmans_before_dockers() -> None:
    assert certificates.folders(Path("/root"), Path("/home/u"), "r.example:5000") == (
        Path("/home/u/.config/containers/certs.d/r.example:5000"),
        Path("/root/etc/containers/certs.d/r.example:5000"),
        Path("/root/etc/docker/certs.d/r.example:5000"),
    )


@pytest.mark.parametrize(
    ("names", "tls"),
    [
        ((), Tls()),
        (("README", "old.pem", "ca.crt.bak"), Tls()),
        (("a.crt", "b.crt"), Tls((FOLDER / "a.crt", FOLDER / "b.crt"))),
        (
            ("ca.crt", "client.cert", "client.key"),
            Tls((FOLDER / "ca.crt",), ClientCertificate(FOLDER / "client.cert", FOLDER / "client.key")),
        ),
        # The stem is all but the last word.
        (("a.b.cert", "a.b.key"), Tls((), ClientCertificate(FOLDER / "a.b.cert", FOLDER / "a.b.key"))),
    ],
)
def test_the_end_of_a_name_says_what_a_file_is_for(names: tuple[str, ...], tls: Tls) -> None:
    assert certificates.parse(FOLDER, names) == tls


@pytest.mark.parametrize(
    ("names", "named", "remedy"),
    [
        (("ca.cert",), "ca.cert", "call it .crt"),
        (("client.cert", "other.key"), "client.cert", "client.key"),
        (("client.key",), "client.key", "client.cert"),
    ],
)
def test_a_certificate_and_its_key_belong_together(names: tuple[str, ...], named: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        certificates.parse(FOLDER, names)
    assert str(FOLDER) in caught.value.message
    assert caught.value.remedy is not None
    assert remedy in caught.value.remedy


def test_in_containerds_folder_a_certificate_may_hold_its_key() -> None:
    tls = certificates.parse(FOLDER, ("client.cert", "other.key"), joined=True)
    assert tls.client == ClientCertificate(FOLDER / "client.cert", None)


def test_of_several_client_certificates_the_first_is_used_which_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, names = Path("/certs.d/several"), ("a.cert", "a.key", "b.cert", "b.key")
    with caplog.at_level(logging.WARNING):
        assert certificates.parse(folder, names).client == ClientCertificate(
            folder / "a.cert", folder / "a.key"
        )
        certificates.parse(folder, names)
    assert len(caplog.records) == 1
    assert "a.cert" in caplog.text
