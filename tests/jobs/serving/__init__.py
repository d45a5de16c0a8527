"""Tests of what asks a real engine."""
