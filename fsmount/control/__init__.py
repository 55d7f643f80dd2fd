"""control: the socket by which a running mount is asked what it does, and told what to do, over HTTP/1.1; both ends.

GET makes a report, POST has an action done. Who may open the socket may do both, and the kernel decides that: root
and the user of the mount always; the members of a group if the administrator has given the runtime folder to it, and
let it in (`install -d -g GROUP -m 0750 /run/fsmount`, or the same by tmpfiles.d or a unit's Group= and
RuntimeDirectoryMode=). A folder that we make ourselves lets nobody in. Whom an action was done for is in the log.
"""

from fsmount.control.client import ask
from fsmount.control.server import Action, Report, serve

__all__ = ["Action", "Report", "ask", "serve"]
