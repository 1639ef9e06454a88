"""The server process: connections, keys and bounds, errors, health, and the orderly end."""
