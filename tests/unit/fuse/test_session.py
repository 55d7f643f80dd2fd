"""Who may let others into a mount."""

from pathlib import Path

import pytest

from fsmount.errors import Refused
from fsmount.fuse import session


@pytest.mark.parametrize(
    ("line", "permitted"),
    [
        ("user_allow_other", True),
        ("  user_allow_other", True),
        ("#user_allow_other", False),
        ("mount_max = 9", False),
    ],
)
def test_a_user_may_let_others_in_if_fuse_conf_says_so(
    line: str, permitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "fuse.conf"
    conf.write_text(f"# comment\n{line}\n")
    monkeypatch.setattr(session, "_FUSE_CONF", conf)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert ("allow_other" in session._options(None)) is permitted
    assert "allow_other" not in session._options(False)
    if not permitted:
        with pytest.raises(Refused, match="only root"):
            session._options(True)
