"""Other people's tools, run against a server: what they find is a defect, or an exception that says why it is none."""
