"""One run from its plan to its report, whatever starts its steps. Knows nothing of Prefect."""
