"""Calibration sets from a user's rows, and control sets."""
