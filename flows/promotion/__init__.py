"""Promotion: the record, the champion, the registry that follows."""
