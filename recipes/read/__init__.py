"""From YAML to a Recipe, with every error at once."""
