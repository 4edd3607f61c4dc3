"""What proves parallel training right: faults, traces and counted traffic."""
