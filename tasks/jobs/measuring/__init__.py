"""Losses, KL and answers of an arm, and where its errors come from."""
