"""Writing: shard by shard, resumed, sealed, grown, repaired."""
