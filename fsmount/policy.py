"""policy: what the administrator lets fsmount do with a layer beyond what is asked of it."""

import enum


class Indexes(enum.StrEnum):
    """By which indexes layers may be read."""

    #: Any: what nobody vouches for is believed until the whole layer has gone by.
    ANY = "any"
    #: Those whose digest the manifest names, directly or through another digest.
    BOUND = "bound"
    #: None: a layer is streamed whole, and verified.
    OFF = "off"

    def strictest(self, other: "Indexes") -> "Indexes":
        return max(self, other, key=list(Indexes).index)


class Complete(enum.StrEnum):
    """When the rest of a layer is fetched that nobody has asked for."""

    #: When something of it was read, and readers have wanted nothing for a while.
    IDLE = "idle"
    #: As soon as a tag with it is opened.
    NOW = "now"
    NEVER = "never"
