"""Our components inside other suites; each module does nothing where its suite is not installed."""
