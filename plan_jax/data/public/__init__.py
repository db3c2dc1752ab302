"""Parts of the builders of public datasets: facts, tables, splits, shards and the summary."""
