"""Measures fsmount against what people use today, in the same run, on the machine it is run on."""
