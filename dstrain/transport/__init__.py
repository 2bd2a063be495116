"""Where a run runs: profiles, hosts, SLURM; what is started on a node."""
