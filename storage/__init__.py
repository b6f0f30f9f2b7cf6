"""Where things are kept. Imports nothing of flows or tasks."""
