"""Loaders: how a folder becomes the model of an arm, by which kernel."""
