"""Programs for developers of streamlab; they are not installed."""
