"""The server: routes, plugins, limits and logs around what scenarios write."""
