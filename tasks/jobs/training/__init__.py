"""What training consists of."""
