"""What scripts/fuzz begins with is good, and what it once found stays found."""

from pathlib import Path

import pytest

from tests.fuzz.run import FOUND
from tests.fuzz.targets import TARGETS, seeds

#: Defects that are known and not mended yet, by the beginning of what is in found/.
KNOWN = {
    "tar-last-padding-missing": "walk_tar, unlike TarScanner, refuses a tar without its last padding",
    "tar-too-short-to-sniff": "codecs.sniff lets an IndexError out for fewer than 149 bytes that have no magic",
    "zstdchunked-shorter-than-a-footer": "find_position lets a struct.error out for a blob shorter than its footer",
    "ztoc-nul": "read_ztoc lets NULs through in paths, links and names of extended attributes",
}


def _found() -> list[object]:
    params: list[object] = []
    for path in sorted(FOUND.iterdir()):
        reasons = [reason for name, reason in KNOWN.items() if path.name.startswith(name)]
        marks = [pytest.mark.xfail(strict=True, reason=reason) for reason in reasons]
        params.append(pytest.param(path, id=path.name, marks=marks))
    return params


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_accepts_what_others_are_made_from(target: str) -> None:
    assert [TARGETS[target](data) for data in seeds(target)] == [True] * len(seeds(target))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("path", _found())
def test_what_once_broke_a_target_does_so_no_more(path: Path) -> None:
    TARGETS[path.name.partition("-")[0]](path.read_bytes())
