"""What the segment before has left."""
