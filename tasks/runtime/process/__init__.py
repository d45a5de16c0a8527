"""Child processes: the contract, the launch, the leases."""
