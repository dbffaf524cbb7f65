"""The format: header, layout, shards, manifest, records and tables. See FORMAT.md."""
