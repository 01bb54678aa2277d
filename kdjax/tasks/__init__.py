"""What a batch means, by kind of task."""
