"""What the commands do: plan a run, make its videos, keep whole results."""
