"""Model and adapter folders, by config.json and the headers of their weights."""
