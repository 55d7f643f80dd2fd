"""scripts/soak: a mount that is read all the time, while everything that it needs fails at random."""
