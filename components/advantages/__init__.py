"""Values, advantages and value targets of every token."""
