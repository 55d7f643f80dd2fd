"""A worker of the holder without a mount, for tests: what stands for the device is the writing end of a pipe.

usage: worker FOLDER PLAN. It appends a line to FOLDER/log for everything that happens, and does what the letter of
PLAN for this start says, or the last one: (s)erves, (f)ails before it serves, (c)rashes once it serves, (u)nmounts:
has what stands for the device kept no more, and ends.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from fsmount.notify import Service


def main(folder: Path, plan: str) -> None:
    log = folder / "log"
    starts = log.read_text().count("start") if log.exists() else 0
    service = Service.from_environment()

    def say(**what: object) -> None:
        with log.open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), **what}) + "\n")

    record = service.inherited.get("record")
    say(
        start=starts,
        inherited=sorted(service.inherited),
        record=None if record is None else os.pread(record, 100, 0).decode(),
        watchdog=service.watchdog_seconds,
    )
    act = plan[min(starts, len(plan) - 1)]
    if act == "f":
        sys.exit(4)
    if "mount-1-0.999" not in service.inherited:
        device = os.open(folder / "device", os.O_WRONLY)
        service.store("mount-1-0.999", device)
        service.store("record", os.memfd_create("record"))
        service.store("record", _memory(b"kept"))
    service.ready()
    if act == "c":
        sys.exit(5)
    if act == "u":
        service.remove("mount-1-0.999")
        sys.exit(0)

    def obey(number: int, frame: object) -> None:
        say(signal=signal.Signals(number).name)
        if number == signal.SIGTERM:
            service.remove("mount-1-0.999")
        if number != signal.SIGHUP:
            sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, obey)
    say(serving=True)
    while True:
        service.pet()
        time.sleep(0.1)


def _memory(text: bytes) -> int:
    descriptor = os.memfd_create("record")
    os.write(descriptor, text)
    return descriptor


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
