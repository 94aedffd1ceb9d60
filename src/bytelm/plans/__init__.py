"""Plans of studies, in YAML."""
