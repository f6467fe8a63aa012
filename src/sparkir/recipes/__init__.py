"""Every shipped run, as TOML."""
