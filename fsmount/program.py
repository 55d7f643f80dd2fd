"""program: how another process of this program is started."""

import sys

#: -P: not with the packages of the folder in which somebody happens to be.
PROGRAM = (sys.executable, "-P", "-m", "fsmount")
