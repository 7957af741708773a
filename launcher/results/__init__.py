"""What a run reached, in a form that can be compared with published rows."""
