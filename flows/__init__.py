"""In which order: the Prefect flow, MLflow tracking, preflight, report and the command line."""
