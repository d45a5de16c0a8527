"""The report's plots as SVG."""
