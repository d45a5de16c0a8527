"""Rows of any number -> the rows of a data set: on disk between two steps, a few bytes of each in memory."""
