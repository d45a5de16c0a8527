"""MLflow: a view of runs and manifests. Nothing else imports it but the registry."""
