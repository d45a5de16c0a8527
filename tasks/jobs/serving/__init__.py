"""A real engine's answers: what its server says of the same rows, and how fast."""
