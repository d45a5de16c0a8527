"""From the bytes of one file to its rows as they are written there: one reader a kind of file, strict and streaming."""
