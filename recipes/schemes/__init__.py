"""How weights are quantized, and who can read the result."""
