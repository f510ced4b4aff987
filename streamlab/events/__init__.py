"""Channels of events: published, stored, followed."""
