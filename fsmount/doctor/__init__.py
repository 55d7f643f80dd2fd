"""What a mount depends on, looked at piece by piece, with a remedy for each that is not as it should be."""

from fsmount.doctor.examination import examine
from fsmount.doctor.finding import Finding, Verdict

__all__ = ["Finding", "Verdict", "examine"]
