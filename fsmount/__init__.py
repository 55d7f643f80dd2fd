"""fsmount: builds kept in a container registry, mounted as read-only trees."""

__version__ = "0.1.0"
