"""One response body, and all of those that are open."""
