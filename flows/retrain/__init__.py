"""The retrain flow: what changed, one run, one decision, one message."""
