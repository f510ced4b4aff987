"""The clients behind the command line."""
