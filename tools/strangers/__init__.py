"""Third-party tools, run against a server: each finding is a defect, or an accepted exception with its reason."""
