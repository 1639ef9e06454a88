"""The HTTP server over bundles, and the scheduler that draws the requests of many clients together."""
