import ditc.runtime  # noqa: F401  # turns telemetry off, before the libraries are imported that read that setting
