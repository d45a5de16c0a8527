"""The streamed merge and its record."""
