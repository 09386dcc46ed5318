"""What a run will take, known before it starts: tasks, memory, time, bytes, and what the cache will serve."""
