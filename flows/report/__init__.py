"""report.json, report.md, report.html and the model card."""
