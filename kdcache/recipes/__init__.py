"""Published training recipes, as TOML files, and how they are read."""
