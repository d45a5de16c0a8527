"""Which rows stand there twice: almost equal rows, and exchanges of train that are in dev or test, too.

Needs numpy and xxhash: whoever must start fast imports it inside a function.
"""
