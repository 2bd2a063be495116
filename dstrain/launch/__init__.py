"""Starting ranks on this machine and staying with them: one plan, one agent, restarts, verdicts."""
