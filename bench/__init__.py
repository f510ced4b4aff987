"""Measurements that stand behind the numbers of README.md; nothing here is installed."""
