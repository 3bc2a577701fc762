"""Self-NPO."""
