"""Programs for those who work on streamlab; nothing of them is installed."""
