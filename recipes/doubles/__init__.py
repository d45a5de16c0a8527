"""Which rows stand there twice: almost equal rows, and exchanges of train that are in dev or test, too.

Its modules need numpy and xxhash: whoever must start fast imports them inside a function.
"""

NOT_LOOKED_FOR = "not looked for between train and dev or test: data.near_duplicates is ignore"
