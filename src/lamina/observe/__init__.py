"""What an operator can learn from outside: metrics and timelines. Knows no engine."""
