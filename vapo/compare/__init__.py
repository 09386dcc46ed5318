"""What differs between runs: artifacts, tables column by column, metrics side by side."""
