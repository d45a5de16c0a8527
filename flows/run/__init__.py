"""A run under way: its folder, its progress, its Prefect server and pages."""
