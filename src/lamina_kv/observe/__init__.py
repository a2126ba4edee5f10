"""What an operator can learn from outside: metrics, timelines and traces. Knows no engine."""
