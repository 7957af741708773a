"""What runs log, and what it means."""
