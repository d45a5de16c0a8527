"""`quench up` and what Prefect has to know of us."""
