"""What every test may rely on."""

import signal


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore it, and then so would all that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
