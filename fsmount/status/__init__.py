"""What a running mount says of itself: how it is, its process, cache, apps and layers, as JSON."""

from fsmount.status.observer import Observer, Process, cached_size
from fsmount.status.report import State, Status, as_json

__all__ = ["Observer", "Process", "State", "Status", "as_json", "cached_size"]
