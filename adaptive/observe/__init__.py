"""What a run's routing did: reduced, judged, written and drawn."""
