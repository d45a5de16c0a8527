"""The machinery under every stage: fingerprint, store, job, launch, run_step. Imports nothing else of ours."""
