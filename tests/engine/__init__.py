"""Tests against a real vLLM: tiny checkpoints, engines in processes of their own, real servers."""
