"""Which arm is the candidate, and whether it may replace the champion."""
