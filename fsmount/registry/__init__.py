"""The clients of registries and layout folders; the only home of httpx."""

import sys

# httpx imports its own command line, with click, rich and pygments, where those are installed: 50 ms for nothing. A
# module that is None cannot be imported, and httpx goes on without.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
